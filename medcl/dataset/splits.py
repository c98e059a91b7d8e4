"""Who trains, who validates, who is tested: always by subject, always a function of names and seeds alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medcl.dataset.case import Case, Manifest
from medcl.errors import MedclError
from medcl.runtime.files import read_json, write_json

FEWEST_TO_SPLIT = 8  # labelled subjects below which nothing is held out: every one is needed to train


@dataclass(frozen=True)
class Split:
    """Subjects of each part, and the labelled subjects drawn from `train`.

    Attributes:
        train, val, test: disjoint subjects.
        labelled: the few drawn from `train` whose labels are used, in drawing order; empty before a draw.
        seed: seed of the split.
        draw: number of the draw.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    labelled: tuple[str, ...] = ()
    seed: int = 0
    draw: int = 0

    def save(self, path: str | Path) -> None:
        """Writes the split to a JSON file that `load` reads."""
        write_json(path, asdict(self))

    @staticmethod
    def load(path: str | Path) -> Split:
        """Reads a split.

        Raises:
            MedclError: the file is missing or holds no split.
        """
        try:
            data: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in read_json(path).items()}
            return Split(**data)
        except (AttributeError, TypeError):
            raise MedclError("holds no split of subjects", path, "Take it from a copy of the run.") from None


def previous_split(run: Path | None) -> Split | None:
    """The split of a run that goes on; None for a new run, or one cut off before it was written."""
    path = run / "split.json" if run else None
    return Split.load(path) if path and path.exists() else None


def ranked(subjects: Iterable[str], key: str) -> list[str]:
    """Subjects in a pseudo-random order that depends on each name and `key` only.

    A subject added later changes nobody else's place relative to one another, which a seeded shuffle would.
    """
    return sorted(set(subjects), key=lambda s: hashlib.sha256(f"{key}\0{s}".encode()).digest())


def make_split(manifest: Manifest, test_fraction: float = 0.25, val_fraction: float = 0.1, seed: int = 0) -> Split:
    """Splits the labelled subjects; unlabelled ones train (for pretext tasks).

    With fewer than 8 labelled subjects nothing is held out, save those that the data set or a table puts into a part.

    Raises:
        MedclError: the fractions leave nobody to train.
    """
    if not (0 <= test_fraction < 1 and 0 <= val_fraction < 1 and test_fraction + val_fraction < 1):
        raise MedclError(
            f"test {test_fraction} and validation {val_fraction} leave nothing to train", "fractions", "Lower them."
        )
    labelled = {case.subject for case in manifest.labelled}
    everyone = set(manifest.subjects)
    # a layout's own test set is held out whether or not its labels were published
    fixed_test = {case.subject for case in manifest.cases if case.split == "test"}
    fixed_val = {case.subject for case in manifest.cases if case.split == "val"} - fixed_test
    pool = ranked(labelled - fixed_test - fixed_val, f"split {seed}")
    hold_out = len(pool) >= FEWEST_TO_SPLIT
    n_test = 0 if fixed_test & labelled or not hold_out else round(test_fraction * len(pool))
    n_val = round(val_fraction * len(pool)) if hold_out and not fixed_val & labelled else 0
    if hold_out and val_fraction > 0 and not fixed_val & labelled:
        n_val = max(1, n_val)
    test, val = set(pool[:n_test]) | fixed_test, set(pool[n_test : n_test + n_val]) | fixed_val
    train = everyone - test - val
    return Split(tuple(sorted(train)), tuple(sorted(val)), tuple(sorted(test)), seed=seed)


def draw_labelled(split: Split, manifest: Manifest, labels: str, draw: int = 0) -> Split:
    """Draws the subjects whose labels are used: the first N of an order fixed by the draw, so draws are nested.

    Args:
        split: the split to draw from.
        manifest: says who is labelled.
        labels: a number of subjects, or `all`.
        draw: which order.

    Raises:
        MedclError: `labels` is not a positive number or `all`, or more than there are.
    """
    able = ranked({c.subject for c in manifest.labelled} & set(split.train), f"draw {split.seed} {draw}")
    if not able:
        first = f"{manifest.problems[0]} " if manifest.problems and not manifest.cases else ""
        raise MedclError(
            "no labelled subject to train with", manifest.root, f"{first}`medcl scan` tells how labels are found."
        )
    if labels == "all":
        count = len(able)
    else:
        try:
            count = int(labels)
        except ValueError:
            raise MedclError(f"{labels!r} is not a number of subjects", "--labels", "Give a number, or all.") from None
        if not 0 < count <= len(able):
            raise MedclError(
                f"{count} labelled subjects asked for, {len(able)} to draw from", "--labels",
                f"{len(split.val)} are held out for validation and {len(split.test)} for test.",
            )  # fmt: skip
    return Split(split.train, split.val, split.test, tuple(able[:count]), split.seed, draw)


def cases_of(manifest: Manifest, subjects: Iterable[str], labelled: bool = False) -> tuple[Case, ...]:
    """All cases of these subjects (every frame of a patient), or only those with a label."""
    wanted = set(subjects)
    return tuple(c for c in (manifest.labelled if labelled else manifest.cases) if c.subject in wanted)

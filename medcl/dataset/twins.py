"""Identical volumes or label maps under two names: of volumes one is kept, so that no two can sit in two splits."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from medcl.dataset.case import BY_TABLE, Case, Problem
from medcl.runtime.files import file_sha256

Pair = tuple[Case, str]


def without_twins(root: Path, read: Iterable[Pair], sizes: Mapping[str, int]) -> tuple[list[Case], list[Problem]]:
    """Keeps one of every set of identical volumes, a labelled one first.

    Identical are equal voxels where they were read, else equal bytes; bytes are compared among files of one size only,
    and in full only where a few samples agree.

    Args:
        root: the folder that the cases' paths are relative to.
        read: every case with a digest of its voxels, empty where they were not read.
        sizes: bytes of each file; DICOM series, which it lacks, are compared by voxels only.
    """
    kept = list(read)
    keys: tuple[Callable[[Case], object], ...] = (
        lambda case: [(root / name).stat().st_size for name in case.image] if case.image[0] in sizes else case.id,
        lambda case: [_sample(root / name) for name in case.image],
        lambda case: [file_sha256(root / name) for name in case.image],
    )
    groups = [kept]
    for key in keys:
        groups = [part for group in groups for part in _split(group, key)]
    twins, problems = set(), []
    for group in groups:
        first, *others = sorted((case for case, _ in group), key=lambda case: (not case.is_labelled, case.id))
        for other in others:
            twins.add(other.id)
            what = f"holds the same image as {first.image[0]}"
            strangers = other.subject != first.subject
            if strangers:
                what += f", although one is subject {first.subject} and the other {other.subject}"
            remedy = f"{first.image[0]} is used; delete one of the two."
            problems.append(Problem(other.image[0], what, remedy, twin=first.image[0] if strangers else ""))
    return [case for case, _ in kept if case.id not in twins], problems


def shared_labels(read: Iterable[Pair]) -> list[Problem]:
    """Questions where two subjects have one label map, which can be right for one of them only.

    Args:
        read: every case with a digest of its label map's voxels; empty where they were not read, or are all background.
    """
    owners: dict[str, list[Case]] = defaultdict(list)
    for case, digest in read:
        if case.is_labelled:
            owners[digest or "\0".join(case.label_files)].append(case)
    questions = []
    for same in owners.values():
        subjects = sorted({case.subject for case in same})
        if len(subjects) > 1:
            other = next(case for case in same if case.subject != same[0].subject)
            more = f" (and {len(subjects) - 2} more subjects)" if len(subjects) > 2 else ""
            what = (
                f"is the label map of subject {same[0].subject}, and equal to {other.label_files[0]} "
                f"of subject {other.subject}{more}"
            )
            remedy = f"Correct it in a table, or take both as they are with --yes. {BY_TABLE}"
            questions.append(Problem(same[0].label_files[0], what, remedy, aside=False, question=True))
    return questions


def _split(group: list[Pair], key: Callable[[Case], object]) -> list[list[Pair]]:
    """The parts of a group that agree in digest, or without one in key; those of a single case are left out."""
    parts: dict[object, list[Pair]] = defaultdict(list)
    for case, digest in group:
        parts[digest or str(key(case))].append((case, digest))
    return [part for part in parts.values() if len(part) > 1]


def _sample(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        for place in (0, size // 2, max(0, size - 4096)):
            stream.seek(place)
            digest.update(stream.read(4096))
    return digest.hexdigest()

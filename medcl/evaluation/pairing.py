"""Which runs may be compared in pairs: same draw, same labelled subjects, same test subjects, same cases scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medcl.errors import MedclError
from medcl.evaluation.absence import row_key, with_absence_rule
from medcl.evaluation.evaluate import Row, mean_over_classes, read_scores
from medcl.evaluation.metrics import MEASURES
from medcl.leakage.audit import notes_on
from medcl.runtime.files import read_json
from medcl.runtime.run import read_config


@dataclass(frozen=True)
class Arm:
    """One fine-tuned run that has been scored on its test subjects.

    Attributes:
        run: its folder.
        config: `config.yaml`, nested keys joined by dots.
        split: `split.json`: subjects under `train`, `val`, `test` and `labelled`.
        plan: `plan.json`, empty where there is none.
        network: what `weights/contract.json` says of the network, empty where there is none.
        rows: `test/evaluation.csv`.
        leakage: what `test/evaluation.json` is marked with.
        unchecked: what else it says of the check for leakage: what was not looked for.
    """

    run: Path
    config: dict[str, Any]
    split: dict[str, list[str]]
    plan: dict[str, Any]
    network: dict[str, Any]
    rows: list[Row]
    leakage: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()

    @property
    def draw(self) -> Any:
        """Number of the draw of labelled subjects, as in `config`."""
        return self.config["draw"]

    @property
    def labels(self) -> Any:
        """Number of labelled subjects, or `all`, as in `config`."""
        return self.config["labels"]


def load_arm(run: Path) -> Arm:
    """Reads the three files of a run that a comparison needs.

    Raises:
        MedclError: one is missing or lacks what is needed.
    """
    run = Path(run)
    config = flat_config(run)
    split = read_json(run / "split.json")
    for key in ("labels", "draw"):
        if key not in config:
            raise MedclError(f"does not say `{key}`", run / "config.yaml", "Compare runs of `medcl finetune`.")
    for key in ("test", "labelled"):
        if not isinstance(split, dict) or not isinstance(split.get(key), list):
            raise MedclError(f"lists no `{key}` subjects", run / "split.json", "Compare runs of `medcl finetune`.")
    plan, contract = (
        read_json(file) if file.exists() else {} for file in (run / "plan.json", run / "weights" / "contract.json")
    )
    rows = read_scores(run / "test" / "evaluation.csv")
    result = run / "test" / "evaluation.json"
    scores = read_json(result) if result.exists() else {}
    leakage = tuple(scores.get("leakage") or ())
    unchecked = tuple(line for line in notes_on(scores) if line not in leakage)
    return Arm(run, config, split, plan, contract.get("backbone", {}), rows, leakage, unchecked)


def flat_config(run: Path) -> dict[str, Any]:
    """A run's options, nested keys joined by dots.

    Raises:
        MedclError: the folder is not a run.
    """
    return _flat(read_config(run))


def pair_runs(runs: Sequence[Arm], baseline: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    """Pairs two arms by draw, in order of draw.

    Raises:
        MedclError: a draw lacks its partner or occurs twice, or partners differ in their drawn subjects, their test
            subjects or the cases and classes scored: then differences are not paired.
    """
    if not runs or not baseline:
        raise MedclError("both arms need at least one run", "compare", "Give one run per draw for each.")
    by_draw = [_by_draw(arms) for arms in (runs, baseline)]
    alone = sorted(map(str, set(by_draw[0]) ^ set(by_draw[1])))
    if alone:
        raise MedclError(f"draw {', '.join(alone)} is in one arm only", "compare", "Give the same draws for both arms.")
    draws = sorted(by_draw[0], key=lambda draw: (str(type(draw)), draw))
    pairs = [(by_draw[0][draw], by_draw[1][draw]) for draw in draws]
    reference = pairs[0][0]
    for first, second in pairs:
        for other, key, what in (
            (second, "labelled", "labelled subjects"),
            (second, "test", "test subjects"),
            (reference, "test", "test subjects"),
        ):
            if set(first.split[key]) != set(other.split[key]):
                raise _not_paired(first, other, f"other {what}")
        for other in (second, reference):
            if first.labels != other.labels:
                raise _not_paired(first, other, "another number of labels")
            if {row_key(row) for row in first.rows} != {row_key(row) for row in other.rows}:
                raise _not_paired(first, other, "other test cases or classes scored")
    return pairs


def _by_draw(arms: Sequence[Arm]) -> dict[Any, Arm]:
    by_draw: dict[Any, Arm] = {}
    for arm in arms:
        if (other := by_draw.setdefault(arm.draw, arm)) is not arm:
            raise MedclError(f"is draw {arm.draw}, and so is {other.run}", arm.run, "Give one run a draw for each arm.")
    return by_draw


def _not_paired(first: Arm, other: Arm, what: str) -> MedclError:
    remedy = "Fine-tune both on the same data with the same --labels, --draw and split, and score both anew."
    return MedclError(f"has {what} than {other.run}, so they cannot be compared in pairs", first.run, remedy)


def paired_means(first: Sequence[Row], second: Sequence[Row]) -> list[Row]:
    """Means over classes of the cases that both have: every metric, and the other's as `<metric>_baseline`.

    Means over unlike classes are not comparable. So a class that the reference lacks counts for both as soon as one
    invents it (`absence.with_absence_rule`), and HD95 counts where both have a distance.
    """
    ours, theirs = ({row_key(row): row for row in rows} for rows in with_absence_rule([first, second]))
    shared = [key for key in ours if key in theirs]
    other = {row["case"]: row for row in mean_over_classes(_blanked(theirs[key], ours[key]) for key in shared)}
    return [
        {**row, **{f"{metric}_baseline": other[row["case"]][metric] for metric in MEASURES}}
        for row in mean_over_classes(_blanked(ours[key], theirs[key]) for key in shared)
    ]


def _blanked(row: Row, partner: Row) -> Row:
    return {**row, **{metric: math.nan for metric in MEASURES if math.isnan(partner[metric])}}


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat

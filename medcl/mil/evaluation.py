"""`medcl mil evaluate`: predictions of bags to scores with intervals over groups."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medcl.config.mil import MILEvaluateConfig
from medcl.errors import MedclError
from medcl.evaluation.auroc import TINY
from medcl.evaluation.statistics import Interval
from medcl.mil.audit import BagAudit
from medcl.mil.bags import read_bags
from medcl.mil.classification import METHOD, classification_scores, few_groups, group_bootstrap
from medcl.runtime.files import write_json
from medcl.runtime.run import log


@dataclass(frozen=True)
class Table:
    """Predictions of bags with known labels.

    Attributes:
        bags: their names (N).
        groups: their groups (N).
        labels: (N,) in 0 .. C-1.
        probabilities: (N, repeats, C), rows sum to 1.
    """

    bags: list[str]
    groups: list[str]
    labels: np.ndarray
    probabilities: np.ndarray


def table_of_predictions(rows: Sequence[dict[str, Any]], classes: Sequence[str]) -> Table:
    """The rows of `predictions.csv` that have a label.

    Raises:
        MedclError: a bag without a known label, or repeats that do not hold the same bags.
    """
    known = [row for row in rows if row["label"]]
    strange = sorted({row["label"] for row in known} - set(classes))
    if not known or strange:
        what = f"labels {', '.join(strange)} are none of {', '.join(classes)}" if strange else "no bag has a label"
        raise MedclError(what, "predictions", "Give bags labelled with the classes of the model.")
    order = list(dict.fromkeys(row["bag_id"] for row in known))
    repeats = sorted({int(row.get("repeat", 0)) for row in known})
    p = np.full((len(order), len(repeats), len(classes)), np.nan)
    for row in known:
        shares = [float(row[f"p_{name}"]) for name in classes]
        p[order.index(row["bag_id"]), repeats.index(int(row.get("repeat", 0)))] = shares
    if np.isnan(p).any():
        raise MedclError("repeats do not hold the same bags", "predictions", "Fit again.")
    p /= p.sum(-1, keepdims=True)
    first = {row["bag_id"]: row for row in known}
    labels = np.array([classes.index(first[bag]["label"]) for bag in order])
    return Table(order, [first[bag]["group"] for bag in order], labels, p)


def score(rows: Sequence[dict[str, Any]], classes: Sequence[str], audit: BagAudit) -> dict[str, Any]:
    """Scores with intervals over groups, from rows of `predictions.csv`, marked with what an audit has found.

    With several repeats a score is the mean over them; a bootstrap draw takes a group's bags in all repeats. `warnings`
    says what keeps an interval from being trusted, `interval` how intervals are made.

    Args:
        rows: a row a bag and repeat.
        classes: names of the classes.
        audit: whether the bags were seen before.

    Returns:
        What metrics.json holds: counts, intervals, and sentences of `leakage` and `gaps`.

    Raises:
        MedclError: see `table_of_predictions`.
    """
    table = table_of_predictions(rows, classes)

    def mean_over_repeats(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        each = [classification_scores(probabilities[:, r], labels) for r in range(probabilities.shape[1])]
        return {key: float(np.mean([scores[key] for scores in each])) for key in each[0]}

    intervals = group_bootstrap(table.probabilities, table.labels, table.groups, scores=mean_over_repeats, samples=1000)
    return {
        "classes": list(classes),
        "bags": len(table.bags),
        "groups": len(set(table.groups)),
        "repeats": table.probabilities.shape[1],
        "scores": {key: interval.to_dict() for key, interval in intervals.items()},
        "leakage": list(audit.leakage),
        "gaps": list(audit.gaps),
        "interval": METHOD,
        "warnings": doubts(table, classes, {key: interval.to_dict() for key, interval in intervals.items()}),
    }


def notices(result: dict[str, Any]) -> tuple[str, ...]:
    """What a reader must know before the scores: whether the bags were seen before, and what nobody knows of it."""
    audit = BagAudit.of(result)
    return audit.leakage + audit.gaps


def audit_of(folder: Path, rows: Sequence[dict[str, Any]]) -> BagAudit:
    """The audit beside a `predictions.csv`; where there is none, what the column `seen` says."""
    audit = BagAudit.load(folder)
    seen = [row["bag_id"] for row in rows if row.get("seen")]
    if not seen or audit.leakage:
        return audit
    bags = {row["bag_id"] for row in rows}
    line = f"leakage: {len(set(seen))} of {len(bags)} held-out bags, such as {seen[0]}, were seen in training"
    return audit + BagAudit((line,))


def doubts(table: Table, classes: Sequence[str], scores: Mapping[str, Any]) -> list[str]:
    """What keeps the intervals of `scores` (of whatever version) from being trusted, a sentence each."""
    lines = few_groups(table.labels, table.groups, classes)
    known = {key: Interval.from_dict(data) for key, data in scores.items()}
    without = [NAMES[key] for key, each in known.items() if math.isfinite(each.estimate) and not each.has_ends]
    if without:
        lines.append(f"no interval for {', '.join(without)}: groups do not differ, or one of them holds a whole class")
    points = [NAMES[key] for key, each in known.items() if each.has_ends and each.high - each.low < TINY]
    if points:
        lines.append(f"the interval of {', '.join(points)} is a point, of an earlier version: run `medcl mil evaluate`")
    return lines


def ends(interval: Interval, between: str = ", ") -> str:
    """`[0.812, 0.934]`, or that there is no interval."""
    return f"[{interval.low:.3f}{between}{interval.high:.3f}]" if interval.has_ends else "[no interval]"


def evaluate_bags(config: MILEvaluateConfig) -> dict[str, Any]:
    """Scores `predictions.csv`, with labels of its own or from a table of bags.

    Raises:
        MedclError: no such file, or no labels.
    """
    path = Path(config.predictions)
    path = path / "predictions.csv" if path.is_dir() else path
    if not path.exists():
        raise MedclError("no such file", path, "Give the run folder of `medcl mil fit`, or a predictions.csv.")
    with open(path, newline="", encoding="utf-8") as stream:
        rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    classes = [name[2:] for name in (rows[0] if rows else {}) if name.startswith("p_")]
    if not rows or not classes or "bag_id" not in rows[0]:
        raise MedclError("is no table of predictions", path, "Give what `medcl mil predict` wrote.")
    if config.reference:
        known = {bag.id: bag for bag in read_bags(config.reference)}
        for row in rows:
            if row["bag_id"] in known:
                bag = known[row["bag_id"]]
                row["label"], row["group"] = bag.label or "", bag.group
    audit = audit_of(path.parent, rows)
    seen = [row["bag_id"] for row in rows if row.get("seen") == "yes"]
    if seen:
        log.warning("%d of %d bags, such as %s, were trained on: these scores are no test.",
                    len(seen), len(rows), seen[0])  # fmt: skip
    result = score(rows, classes, audit.with_groups({row["bag_id"]: row["group"] for row in rows}))
    if config.out:
        write_json(Path(config.out), result)
    return result


NAMES = {
    "auroc": "AUROC", "auprc": "AUPRC", "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "f1": "F1",
    "brier": "Brier score", "calibration_error": "calibration error",
}  # fmt: skip


def print_scores(result: dict[str, Any]) -> None:
    """Prints scores with their intervals, and what they are marked with."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    about = f"{result['bags']} bags of {result['groups']} groups"
    if result["repeats"] > 1:
        about += f", mean over {result['repeats']} repeats"
    table = Table(title=f"{about} [95 % interval over groups]", title_style="")
    table.add_column("score")
    table.add_column(" / ".join(result["classes"]), justify="right")
    for key, data in result["scores"].items():
        interval = Interval.from_dict(data)
        table.add_row(NAMES.get(key, key), escape(f"{interval.estimate:.3f} {ends(interval)}"))
    console = Console()
    console.print(table)
    for line in notices(result):
        console.print(f"{line[:1].upper()}{line[1:]}.", style="yellow", markup=False, soft_wrap=True)
    for line in result.get("warnings", ()):
        console.print(f"Warning: {line}", style="yellow", markup=False, soft_wrap=True)

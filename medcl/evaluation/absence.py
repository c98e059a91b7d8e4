"""What a structure counts that the reference lacks: one rule for means, pairs, curves and pages.

- Where the prediction holds it (`invented`), Dice and NSD are 0.
- Where the prediction lacks it too (`absent`), it counts `nothing` by default: a run by itself has no value there. Runs
  that are compared must be over the same structures. So as soon as one of them invents the structure in a case, it
  counts 1 there in every run that rightly predicts none of it, in all draws. The difference of two means is then the
  mean of the paired differences, and an invention shows in both.
- With `one`, it counts 1 in every run, invented or not by another.
- HD95 has a value only where reference and prediction both hold the structure, by either rule. In pairs it counts where
  both arms have it, and the pairs that one arm alone leaves out are counted.

What the other rule would give stands beside every result that it would change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from medcl.errors import MedclError

COUNTS = {"nothing": "counts nothing", "one": "counts 1"}
INSTEAD = {"nothing": "left out", "one": "counted as 1"}
OVERLAPS = ("dice", "nsd")

Row = dict[str, Any]


def check_absent(absent: str) -> None:
    """Refuses what is neither rule.

    Raises:
        MedclError: it is unknown.
    """
    if absent not in COUNTS:
        raise MedclError(f"unknown rule {absent!r} for absent structures", "--absent", f"Use {' or '.join(COUNTS)}.")


def other_rule(absent: str) -> str:
    """The rule that is not this one."""
    return next(rule for rule in COUNTS if rule != absent)


def row_key(row: Row) -> tuple[str, str, int]:
    """Case, subject and class: what is paired with what."""
    return row["case"], row["subject"], row["class"]


def with_absence_rule(runs: Sequence[Sequence[Row]], absent: str = "nothing") -> list[list[Row]]:
    """The rows of runs that are looked at together, with what a right absence counts filled in.

    Args:
        runs: rows of `evaluation.csv` of each, where an absent structure has no Dice (NaN).
        absent: what it counts where no run invents it: `nothing` or `one`.

    Returns:
        The same rows in the same order. A structure that still has no Dice has none in any of the runs. Settling a
        second time changes nothing.
    """
    valued = {row_key(row) for rows in runs for row in rows if not math.isnan(row["dice"])}
    right = dict.fromkeys(OVERLAPS, 1.0)
    return [
        [
            {**row, **right} if math.isnan(row["dice"]) and (absent == "one" or row_key(row) in valued) else row
            for row in rows
        ]
        for rows in runs
    ]


def absences(runs: Sequence[Sequence[Row]]) -> int:
    """In how many rows a structure is absent from reference and prediction; the two rules differ only there."""
    return sum(math.isnan(row["dice"]) for rows in runs for row in rows)


def how_absent(absent: str, compared: bool = True) -> str:
    """The rule in a sentence, for `conventions` and `how`."""
    unless = ", but 1 in every run compared as soon as one of them invents it in that case"
    return (
        "A structure that the reference lacks counts 0 (Dice, NSD) where it is invented; where it is rightly not "
        f"predicted, it {COUNTS[absent]}{unless if compared and absent == 'nothing' else ''}. "
        "HD95 counts only where reference and prediction both hold the structure."
    )

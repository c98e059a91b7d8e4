"""Label efficiency: what every arm reaches at every number of labels, and how sure one can be that it is ahead."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medcl.config import BenchmarkConfig
from medcl.efficiency.grid import Cell, Grid
from medcl.evaluation.absence import (
    COUNTS,
    INSTEAD,
    absences,
    how_absent,
    other_rule,
    with_absence_rule,
)  # fmt: skip
from medcl.evaluation.evaluate import Row, mean_over_classes, read_scores
from medcl.evaluation.metrics import MEASURES
from medcl.evaluation.pairing import paired_means
from medcl.evaluation.statistics import (
    METHOD,
    METHOD_OVER_DRAWS,
    MIN_DRAWS,
    MIN_SUBJECTS,
    Interval,
    PairedDifference,
    bootstrap_mean,
    counted,
    format_difference,
    format_interval,
    format_p,
    holm,
    paired_difference,
)
from medcl.leakage.audit import notes_on
from medcl.runtime.files import read_json, write_json, write_text

VERSION = 1
Scores = dict[tuple[str, str], list[list[Row]]]  # rows of every draw, by arm and number of labels
METRIC = "dice"
DICE = MEASURES[METRIC]
WIDTH = 120


def summarise(config: BenchmarkConfig, grid: Grid) -> dict[str, Any]:
    """Every arm at every number of labels: its Dice, its difference to the baseline, and what may be said of it.

    The p-values are corrected by Holm's rule over all arms and numbers of labels together.
    """
    numbers = sorted(config.labels, key=lambda n: math.inf if n == "all" else int(n))  # in whatever order they ran
    scores = {
        (arm, labels): [read_scores(run / config.subjects / "evaluation.csv") for run in grid.runs(arm, labels)]
        for arm in config.arms
        for labels in numbers
        if grid.runs(arm, labels)
    }
    same = _over_same_structures(scores, config.absent)
    rows = {
        key: [{**row, "draw": draw} for draw, scored in enumerate(runs) for row in mean_over_classes(scored)]
        for key, runs in same.items()
    }
    paired, corrected = _differences(same, config.baseline)
    ceiling = _mean(rows[config.baseline, "all"]).estimate if "all" in config.labels else math.nan
    ceiling = ceiling if ceiling > 0 else math.nan
    stamps, unchecked = _stamps(config, grid)
    entries = []
    for (arm, labels), of_cell in rows.items():
        interval = _mean(of_cell)
        entry: dict[str, Any] = {
            "arm": arm, "labels": labels, "dice": interval.to_dict(), "per_draw": _per_draw(of_cell),
            "share_of_all": None if math.isnan(share := interval.estimate / ceiling) else share,
        }  # fmt: skip
        if (arm, labels) in paired:
            difference, p = paired[arm, labels], corrected[arm, labels]
            entry |= {"difference": difference.to_dict(), "p_holm": None if math.isnan(p) else p}
            entry["verdict"] = _verdict(difference, p)
            entry["sentence"] = sentence(arm, labels, difference, p, config.baseline)
        entries.append(entry)
    return {
        "medcl_benchmark": VERSION,
        "subjects": config.subjects,
        "baseline": config.baseline,
        "arms": list(config.arms),
        "labels": numbers,
        "draws": config.draws,
        "entries": entries,
        "sentences": [entry["sentence"] for entry in entries if "sentence" in entry],
        "unchecked": unchecked,
        "warnings": [*stamps, *_gaps(scores, config.baseline)],
        "absent": config.absent,
        "sensitivity": _sensitivity(scores, config),
        "how": how(config),
    }


def _over_same_structures(scores: Scores, absent: str) -> Scores:
    """All runs over the same structures, so that arms and numbers of labels can be read against each other."""
    rows = iter(with_absence_rule([rows for runs in scores.values() for rows in runs], absent))
    return {key: [next(rows) for _ in runs] for key, runs in scores.items()}


def _differences(
    scores: Scores, baseline: str
) -> tuple[dict[tuple[str, str], PairedDifference], dict[tuple[str, str], float]]:
    """Every arm minus the baseline at every number of labels, and p by Holm's rule over all of them."""
    others = [key for key in scores if key[0] != baseline]
    paired = {key: _paired(scores[key], scores[baseline, key[1]]) for key in others}
    return paired, dict(zip(others, holm([paired[key].p for key in others]), strict=True))


def _sensitivity(scores: Scores, config: BenchmarkConfig) -> list[str]:
    """What the other rule for absent structures would give, a line a difference; nothing where none is absent."""
    n = absences([rows for runs in scores.values() for rows in runs])
    if not n:
        return []
    rule = other_rule(config.absent)
    paired, p = _differences(_over_same_structures(scores, rule), config.baseline)
    return [
        f"A class of a case is absent from reference and prediction {counted(n, 'time')}, over all runs; where no run "
        f"invents it, it {COUNTS[config.absent]}. {INSTEAD[rule].capitalize()} there:",
        *(sentence(arm, labels, paired[arm, labels], p[arm, labels], config.baseline) for arm, labels in paired),
    ]


def _stamps(config: BenchmarkConfig, grid: Grid) -> tuple[list[str], list[str]]:
    """What results are marked with, once an arm: leakage that was allowed, and notes of the check for it."""
    found: dict[tuple[bool, str], None] = {}
    for cell in grid.cells:
        path = Path(cell.config.out) / config.subjects / "evaluation.json"
        result = read_json(path) if path.exists() else {}
        leakage = result.get("leakage") or ()
        found.update({(line in leakage, f"{cell.arm}: {line}"): None for line in notes_on(result)})
    return [line for marked, line in found if marked], [line for marked, line in found if not marked]


def _gaps(scores: Mapping[tuple[str, str], Sequence[Sequence[Row]]], baseline: str) -> list[str]:
    """Which cells lack cases that others have: a volume that could not be predicted, for one."""
    every = {row["case"] for runs in scores.values() for rows in runs for row in rows}
    lines = []
    for (arm, labels), runs in scores.items():
        for draw, rows in enumerate(runs):
            lacking = sorted(every - {row["case"] for row in rows})
            if lacking:
                lines.append(
                    f"{arm} at {describe_labels(labels)}, draw {draw}: {counted(len(lacking), 'case')} not scored, "
                    f"such as {lacking[0]}; differences are over the subjects that an arm and {baseline} both have"
                )
    return lines


def sentence(arm: str, labels: str, difference: PairedDifference, p: float, baseline: str) -> str:
    """`voco at 2 labels: +1.9 Dice points [0.8, 3.1], p = 0.004, 3 draws x 40 subjects: ahead of scratch`."""
    interval = difference.interval
    size = f"{counted(interval.n_draws, 'draw')} x {counted(interval.n_subjects, 'subject')}"
    said = {
        "ahead": f"ahead of {baseline}",
        "behind": f"behind {baseline}",
        "undecided": f"cannot be told apart from {baseline}",
        "few subjects": f"too few subjects to say (at least {MIN_SUBJECTS})",
        "few draws": f"too few draws to say (at least {MIN_DRAWS})",
    }[_verdict(difference, p)]
    return f"{arm} at {describe_labels(labels)}: {format_difference(interval, DICE)}, {format_p(p)}, {size}: {said}"


def describe_labels(labels: str) -> str:
    """`1 label`, `2 labels` or `all labels`."""
    return "all labels" if labels == "all" else counted(int(labels), "label")


def how(config: BenchmarkConfig) -> list[str]:
    """How the numbers came about, for the page and the JSON."""
    scored = "test subjects" if config.subjects == "test" else "validation subjects, on whom recipes may be chosen"
    return [
        f"Scored are the {scored}: no training, no pretraining and, for test subjects, no choice has seen them.",
        "Every arm has the same nested draws of labelled subjects, augmentation, schedule and choice of checkpoint by "
        "the validation subjects; arms differ in where they start from and in what `arms` lists.",
        f"Interval: 95 %, {METHOD_OVER_DRAWS}; where there is one draw, {METHOD}.",
        "p: two-sided sign-flip permutation test over subjects, each with its mean over draws, corrected by Holm's "
        "rule over all arms and numbers of labels. It speaks of these draws, the interval of other draws too.",
        "One pretraining an arm: how much another seed of it would change is in no interval.",
        how_absent(config.absent),
        "d_z: mean over standard deviation of the subjects' differences.",
        "An arm is called ahead or behind only where the interval leaves out zero, p < 0.05, and there are at least "
        f"{MIN_SUBJECTS} subjects and {MIN_DRAWS} draws.",
    ]


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heading and printed cells: an arm at a number of labels a row."""
    head = ["labels", "arm", "Dice (%)", f"minus {result['baseline']}", "p (Holm)", "d_z", "of all-labels"]
    lines = []
    for labels in result["labels"]:
        for entry in result["entries"]:
            if entry["labels"] == labels:
                lines.append([labels, entry["arm"], *_cells(entry)])
    return head, lines


def print_benchmark(result: Mapping[str, Any]) -> None:
    """Prints the table and a sentence an arm."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    head, lines = table(result)
    drawn = Table(title=f"Dice of {result['subjects']} subjects, mean [95 % interval]", box=SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(head):
        drawn.add_column(escape(heading), justify="left" if i < 2 else "right", no_wrap=True)
    for i, line in enumerate(lines):
        if i and lines[i - 1][0] != line[0]:
            drawn.add_section()
        drawn.add_row(*map(escape, line))
    console = Console()
    if not console.is_terminal:  # a log file is as wide as the table
        console = Console(width=WIDTH)
    console.print(drawn)
    for warning in [*result["unchecked"], *result["warnings"]]:
        console.print(f"Warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    for line in [*result.get("sensitivity", ()), *result["sentences"]]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def rows_by_key(config: BenchmarkConfig, grid: Grid) -> list[tuple[Cell, list[Row]]]:
    """The scores of every cell, a row per case and class."""
    return [(cell, read_scores(Path(cell.config.out) / config.subjects / "evaluation.csv")) for cell in grid.cells]


def write_summary(out: Path, result: Mapping[str, Any], cells: Iterable[tuple[Cell, Sequence[Row]]]) -> None:
    """Writes benchmark.json, and results.csv with a row per subject, case, class, arm, number of labels and draw."""
    stream = io.StringIO()
    columns = ["arm", "labels", "draw", "subject", "case", "class", "name", "outcome", *MEASURES]
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for cell, rows in cells:
        for row in rows:
            full = {"arm": cell.arm, "labels": cell.labels, "draw": cell.draw, **row}
            writer.writerow(
                "" if isinstance(full[key], float) and math.isnan(full[key]) else full[key] for key in columns
            )
    write_text(out / "results.csv", stream.getvalue())
    write_json(out / "benchmark.json", dict(result))


def _cells(entry: Mapping[str, Any]) -> list[str]:
    share = "-" if entry["share_of_all"] is None else f"{100 * entry['share_of_all']:.1f} %"
    dice = format_interval(Interval.from_dict(entry["dice"]), DICE)
    if "difference" not in entry:
        return [dice, "", "", "", share]
    gap, p, effect = entry["difference"], entry["p_holm"], entry["difference"]["effect_size"]
    return [
        dice,
        format_interval(Interval.from_dict(gap), DICE, signed=True),
        "-" if p is None else format_p(p).removeprefix("p ").removeprefix("= "),
        "-" if effect is None else f"{effect:.2f}",
        share,
    ]


def _verdict(difference: PairedDifference, p: float) -> str:
    """The verdict after correction: what the plain test cannot say, the corrected one cannot either."""
    verdict = difference.verdict()
    return "undecided" if verdict in ("ahead", "behind") and not p < 1 - difference.interval.level else verdict


def _mean(rows: Sequence[Row]) -> Interval:
    mean = bootstrap_mean([r[METRIC] for r in rows], [r["subject"] for r in rows], [r["draw"] for r in rows])
    return mean.within(0, 1)


def _per_draw(rows: Sequence[Row]) -> list[float | None]:
    """Mean over subjects, draw by draw; None where there is no value."""
    draws = sorted({row["draw"] for row in rows})
    by_draw = [[row for row in rows if row["draw"] == draw] for draw in draws]
    means = [bootstrap_mean([r[METRIC] for r in of], [r["subject"] for r in of], samples=1) for of in by_draw]
    return [mean.to_dict()["estimate"] for mean in means]


def _paired(runs: Sequence[Sequence[Row]], baseline: Sequence[Sequence[Row]]) -> PairedDifference:
    rows = [
        {**row, "draw": draw}
        for draw, (ours, theirs) in enumerate(zip(runs, baseline, strict=True))
        for row in paired_means(ours, theirs)
    ]
    return paired_difference(
        [row[METRIC] for row in rows], [row[f"{METRIC}_baseline"] for row in rows],
        [row["subject"] for row in rows], [row["draw"] for row in rows],
    )  # fmt: skip

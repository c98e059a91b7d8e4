"""Did it help? Pairs fine-tuned runs with their baselines, draw by draw and subject by subject."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medcl.evaluation import statistics
from medcl.evaluation.absence import (
    COUNTS,
    INSTEAD,
    absences,
    check_absent,
    how_absent,
    other_rule,
    row_key,
    with_absence_rule,
)  # fmt: skip
from medcl.evaluation.evaluate import Row
from medcl.evaluation.metrics import MEASURES
from medcl.evaluation.pairing import Arm, load_arm, pair_runs, paired_means
from medcl.evaluation.statistics import Interval, PairedDifference, bootstrap_mean, holm, paired_difference
from medcl.runtime.files import write_json, write_text

COMPARISON_VERSION = 1
PRIMARY = "dice"
# What two arms of one comparison may differ in, apart from what the comparison is about (`init`).
# A plan is compared by what it says, not by where it came from.
_NETWORK = {"backbone", "width", "norm"}
_MAY_DIFFER = {
    "allow_leakage",
    "init",
    "out",
    "name",
    "resume",
    "debug",
    "draw",
    "plan",
    "store",
    "workers",
    "checkpoint_every",
}


def compare(
    runs: Sequence[Path],
    baseline: Sequence[Path],
    out: Path,
    names: tuple[str, str] = ("pretrained", "scratch"),
    *,
    absent: str = "nothing",
    seed: int = 0,
    samples: int = 10_000,
) -> dict[str, Any]:
    """Compares runs with baselines that had the same draws of labelled subjects and the same test subjects.

    Args:
        runs: run folders of the arm in question, one per draw.
        baseline: run folders of the other arm, one per draw.
        out: folder for `compare.json` and `compare.csv` (a row per draw, case and class).
        names: what the arms are called.
        absent: what a structure counts that the reference and all runs lack, see `absence`.
        seed: of the resampling.
        samples: bootstrap samples.

    Returns:
        What `compare.json` holds.

    Raises:
        MedclError: a run is incomplete, or the two arms are not a paired comparison.
    """
    check_absent(absent)
    raw = pair_runs([load_arm(run) for run in runs], [load_arm(run) for run in baseline])
    pairs = _over_same_structures(raw, absent)
    joined = [row for first, second in pairs for row in _join(first, second)]
    overall = _overall(pairs)
    classes = {row["class"]: row["name"] for row in joined}
    first_arm = pairs[0][0]
    metrics, primary = {}, _paired(overall, PRIMARY, seed, samples)
    for metric in MEASURES:
        entries = [_entry([row for row in joined if row["class"] == value], metric, seed, samples) for value in classes]
        corrected = holm([math.nan if entry["p"] is None else entry["p"] for entry in entries])
        metrics[metric] = {
            "mean": _entry(overall, metric, seed, samples),
            "classes": [
                {"class": value, "name": name, **entry, "p_holm": None if math.isnan(p) else p}
                for (value, name), entry, p in zip(classes.items(), entries, corrected, strict=True)
            ],
        }
    result = {
        "medcl_comparison": COMPARISON_VERSION,
        "names": list(names),
        "labels": first_arm.labels,
        "draws": [first.draw for first, _ in pairs],
        "n_subjects": primary.interval.n_subjects,
        "sentence": primary.sentence(names, PRIMARY),
        "verdict": primary.verdict(MEASURES[PRIMARY].higher_is_better),
        "leakage": _leakage(pairs, names),
        "unchecked": _unchecked(pairs, names),
        "warnings": [*_leakage(pairs, names), *_warnings(pairs), *_without_distance(joined, names)],
        "absent": absent,
        "sensitivity": _sensitivity(raw, names, absent, seed, samples),
        "metrics": metrics,
        "subjects": _per_subject(overall),
        "cases": _per_case(overall),
        "schedule": {key: value for key, value in first_arm.config.items() if key not in _MAY_DIFFER},
        "how": _how(names, first_arm.labels, len(pairs), absent),
    }
    write_text(Path(out) / "compare.csv", _to_csv(joined))
    write_json(Path(out) / "compare.json", result)
    return result


def print_comparison(result: Mapping[str, Any]) -> None:
    """Prints the result of `compare` for a person: the sentence, then the table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    first, second = result["names"]
    title = f"{result['labels']} labelled subjects, {first} against {second}, mean [95 % interval]"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("", first, second, "difference", "p", "d_z"):
        table.add_column(escape(heading), justify="left" if not heading else "right", no_wrap=True)
    for metric, measure in MEASURES.items():
        block = result["metrics"][metric]
        for name, entry in [("mean", block["mean"])] + [(entry["name"], entry) for entry in block["classes"]]:
            style = "bold" if metric == PRIMARY and entry is block["mean"] else None
            table.add_row(escape(f"{measure.title} {name}"), *comparison_cells(entry, metric), style=style)
        table.add_section()
    console = Console()
    console.print(table)
    for warning in [*result["unchecked"], *result["warnings"]]:
        console.print(f"Warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    for line in result["sensitivity"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(result["sentence"], style="bold", markup=False, highlight=False, soft_wrap=True)


def comparison_cells(entry: Mapping[str, Any], metric: str) -> list[str]:
    """Printed cells of one row: both arms, the difference with its interval, p (Holm's where there is one), d_z."""
    measure = MEASURES[metric]
    arms = [entry[arm]["estimate"] for arm in ("first", "second")]
    interval, p = Interval.from_dict(entry), entry.get("p_holm", entry["p"])
    return [
        *("-" if value is None else f"{value * measure.scale:.{measure.digits}f}" for value in arms),
        statistics.format_interval(interval, measure, signed=True),
        "-" if p is None else statistics.format_p(p).removeprefix("p ").removeprefix("= "),
        "-" if entry["effect_size"] is None else f"{entry['effect_size']:.2f}",
    ]


def _over_same_structures(pairs: Sequence[tuple[Arm, Arm]], absent: str) -> list[tuple[Arm, Arm]]:
    """The pairs over the same structures in all arms and draws."""
    rows = iter(with_absence_rule([arm.rows for pair in pairs for arm in pair], absent))
    return [(replace(first, rows=next(rows)), replace(second, rows=next(rows))) for first, second in pairs]


def _overall(pairs: Sequence[tuple[Arm, Arm]]) -> list[Row]:
    """Means over classes, a row per draw and case."""
    return [{"draw": a.draw, **row} for a, b in pairs for row in paired_means(a.rows, b.rows)]


def _sensitivity(
    raw: Sequence[tuple[Arm, Arm]], names: tuple[str, str], absent: str, seed: int, samples: int
) -> list[str]:
    """What the other rule for absent structures would give; nothing where no structure is absent."""
    if not absences([arm.rows for pair in raw for arm in pair]):
        return []
    invented = [sum(row["outcome"] == "invented" for pair in raw for row in pair[i].rows) for i in (0, 1)]
    times = ", ".join(f"{statistics.counted(n, 'time')} by {name}" for n, name in zip(invented, names, strict=True))
    rule = other_rule(absent)
    other = _paired(_overall(_over_same_structures(raw, rule)), PRIMARY, seed, samples)
    if not other.interval.n_subjects:
        return []
    return [
        f"A structure that the reference lacks is invented {times}; where no run invents it, it {COUNTS[absent]}. "
        f"{INSTEAD[rule].capitalize()} there, the difference would be "
        f"{statistics.format_difference(other.interval, MEASURES[PRIMARY])}, {statistics.format_p(other.p)}, "
        f"{statistics.counted(other.interval.n_subjects, 'subject')}."
    ]


def _without_distance(joined: Sequence[Row], names: tuple[str, str]) -> list[str]:
    """How many pairs HD95 leaves out because one arm alone has no distance there: it misses the structure."""
    lacks = [(math.isnan(row["hd95"]), math.isnan(row["hd95_baseline"])) for row in joined]
    alone = [sum(mine and not other for mine, other in lacks), sum(other and not mine for mine, other in lacks)]
    if not sum(alone):
        return []
    missed = ", ".join(f"{n} missed by {name} alone" for n, name in zip(alone, names, strict=True))
    return [
        f"HD95 leaves out {statistics.counted(sum(alone), 'pair')} of {len(lacks)} (draw, case and class), {missed}: "
        "read it together with Dice, where these count 0"
    ]


def _join(first: Arm, second: Arm) -> list[Row]:
    other = {row_key(row): row for row in second.rows}
    return [
        {"draw": first.draw, **row, **{f"{key}_baseline": other[row_key(row)][key] for key in ("outcome", *MEASURES)}}
        for row in first.rows
    ]


def _paired(rows: Sequence[Row], metric: str, seed: int, samples: int) -> PairedDifference:
    a, b = [row[metric] for row in rows], [row[f"{metric}_baseline"] for row in rows]
    subjects, draws = [row["subject"] for row in rows], [row["draw"] for row in rows]
    return paired_difference(a, b, subjects, draws, seed=seed, samples=samples)


def _entry(rows: Sequence[Row], metric: str, seed: int, samples: int) -> dict[str, Any]:
    """The paired difference, and each arm by itself over the same cases."""
    shared = [row for row in rows if not math.isnan(row[metric] - row[f"{metric}_baseline"])]
    subjects, draws = [row["subject"] for row in shared], [row["draw"] for row in shared]
    arms = {
        arm: bootstrap_mean([row[key] for row in shared], subjects, draws, seed=seed, samples=samples).to_dict()
        for arm, key in (("first", metric), ("second", f"{metric}_baseline"))
    }
    return {**_paired(rows, metric, seed, samples).to_dict(), **arms}


def _per_subject(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean of the primary metric over draws and cases, per subject and arm."""
    return _grouped(rows, "subject")


def _per_case(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return _grouped(rows, "case")


def _grouped(rows: Sequence[Row], key: str) -> list[dict[str, Any]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if not math.isnan(row[PRIMARY] - row[f"{PRIMARY}_baseline"]):
            groups.setdefault(row[key], []).append(row)
    result = []
    for name, group in sorted(groups.items()):
        first, second = (sum(row[column] for row in group) / len(group) for column in (PRIMARY, f"{PRIMARY}_baseline"))
        result.append({key: name, "first": first, "second": second, "difference": first - second})
    return result


def _leakage(pairs: Sequence[tuple[Arm, Arm]], names: tuple[str, str]) -> list[str]:
    return [
        f"draw {arm.draw}, {name}: {line}"
        for pair in pairs
        for arm, name in zip(pair, names, strict=True)
        for line in arm.leakage
    ]


def _unchecked(pairs: Sequence[tuple[Arm, Arm]], names: tuple[str, str]) -> list[str]:
    """What was not checked for leakage, once an arm."""
    arms = [(arm, name) for pair in pairs for arm, name in zip(pair, names, strict=True)]
    return list(dict.fromkeys(f"{name}: {line}" for arm, name in arms for line in arm.unchecked))


def _warnings(pairs: Sequence[tuple[Arm, Arm]]) -> list[str]:
    """Why the difference may not be due to the initialisation alone."""
    lines = []
    for first, second in pairs:
        # An arm that starts from a pretrained run takes its network from there, whatever its own options say.
        known = first.network and second.network
        free = _MAY_DIFFER | (_NETWORK if known else set())
        for what, keys in (
            ("differ in more than their initialisation", _differing(first.config, second.config) - free),
            ("are different networks", _differing(first.network, second.network) if known else set()),
            ("were prepared by different plans", _differing(first.plan, second.plan)),
        ):
            if keys:
                lines.append(f"draw {first.draw}: the arms {what}: {', '.join(sorted(keys))}")
        if set(first.split.get("val", [])) != set(second.split.get("val", [])):
            lines.append(f"draw {first.draw}: the arms were selected on different validation subjects")
    inits = [{str(arm.config.get("init")) for arm in arms} for arms in zip(*pairs, strict=True)]
    if inits[0] & inits[1]:
        lines.append("both arms name the same initialisation")
    return lines


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> set[str]:
    return {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}


def _how(names: tuple[str, str], labels: Any, draws: int, absent: str) -> list[str]:
    return [
        f"Both arms were fine-tuned on the same draws of {labels} labelled subjects and tested on the same subjects.",
        "The difference is the mean over test subjects, each with the mean over its cases and over draws.",
        how_absent(absent),
        f"Interval: 95 %, {statistics.METHOD_OVER_DRAWS if draws > 1 else statistics.METHOD}.",
        "p: two-sided sign-flip permutation test over subjects, for these draws; per class corrected by Holm's rule "
        "over the classes of a metric.",
        "d_z: mean over standard deviation of the subjects' differences.",
        f"{names[0]} is called ahead or behind only where the interval leaves out zero, p < 0.05, and there are at "
        f"least {statistics.MIN_SUBJECTS} subjects and {statistics.MIN_DRAWS} draws.",
    ]


def _to_csv(rows: Sequence[Row]) -> str:
    stream = io.StringIO()
    scores = [f"{metric}{arm}" for metric in MEASURES for arm in ("", "_baseline")]
    columns = ["draw", "case", "subject", "class", "name", "outcome", "outcome_baseline", *scores]
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow("" if isinstance(row[key], float) and math.isnan(row[key]) else row[key] for key in columns)
    return stream.getvalue()

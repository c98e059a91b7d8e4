"""The sections of a run's report, each a list of HTML parts; empty where the run has nothing to say on it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medcl.dataset.case import Manifest
from medcl.evaluation.evaluate import Row, interval_cells
from medcl.evaluation.metrics import MEASURES
from medcl.evaluation.statistics import Interval, format_interval
from medcl.losses.diagnostics import MEANING
from medcl.report import figures
from medcl.report import page as html


def headline(config: Mapping[str, Any], scores: Mapping[str, Any] | None, series: Mapping[str, figures.Series]) -> str:
    """The one sentence that a reader in a hurry needs: the test Dice, else how far the loss fell."""
    if not scores:
        steps, loss = series.get("loss", (np.empty(0), np.empty(0)))
        tenth = max(1, len(loss) // 10)
        fell = f"{np.median(loss[:tenth]):.3g} to {np.median(loss[-tenth:]):.3g}" if len(loss) else ""
        return f"Loss from {fell} in {int(steps[-1])} steps; not yet scored on a test set." if fell else ""
    interval = Interval.from_dict(scores["mean"]["dice"])
    trained = f", trained with {config['labels']} labelled subjects" if "labels" in config else ""
    start = config.get("init")
    origin = "" if start is None else " from random weights" if start == "none" else " from a pretrained encoder"
    dice = format_interval(interval, MEASURES["dice"])
    return f"Mean Dice {dice} % on {interval.n_subjects} test subjects{trained}{origin if trained else ''}."


def numbers(scores: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """Tables of the scores: by class with intervals, and by case."""
    head = ["class", *(_metric_title(metric, scores) for metric in MEASURES), "subjects", "missed", "invented"]
    lines = [["mean over classes", *interval_cells(scores["mean"]), scores["mean"]["dice"]["n_subjects"], "", ""]]
    for entry in scores["classes"]:
        counts = [entry["outcomes"][outcome] for outcome in ("missed", "invented")]
        lines.append([entry["name"], *interval_cells(entry), entry["dice"]["n_subjects"], *counts])
    cases = [
        [row["case"], row["name"], *(_cell(row[metric], metric) for metric in MEASURES), row["outcome"]]
        for row in sorted(rows, key=lambda row: (row["case"], row["class"]))
    ]
    strips = ""
    if rows:
        caption = "A dot per test case; the bar is the median."
        strips = html.figure(figures.score_strips(rows), "Dice of every test case by class", caption, large=True)
    return [
        html.table(head, lines, strong=[0]),
        strips,
        html.details("How these are defined", html.bullets(scores["conventions"])),
        html.details("Every case", html.table(["case", "class", *MEASURES, "outcome"], cases, text_columns=2)),
    ]


def curves(series: Mapping[str, figures.Series]) -> list[str]:
    """Loss beside what trivial solutions would give, learning rate, validation Dice; the rest is folded away."""
    groups: dict[str, dict[str, figures.Series]] = {}
    lines = {
        MEANING.get(name.removeprefix("trivial_"), name): values
        for name, values in series.items()
        if name.startswith("trivial_")
    }
    series = {name: values for name, values in series.items() if not name.startswith("trivial_")}
    for name, values in series.items():
        short = name.rsplit("/", 1)[-1]
        if "loss" in short:
            groups.setdefault("loss", {})[name] = values
        elif short in ("effective_rank", "cosine_gap"):
            groups.setdefault(short.replace("_", " "), {})[name] = values
        elif short in ("lr", "learning_rate"):
            groups.setdefault("learning rate", {})[name] = values
        elif "dice" in short:
            groups.setdefault("validation Dice (%)", {})[name] = values
        else:
            groups.setdefault(name, {})[name] = values
    shown = ("loss", "validation Dice (%)", "effective rank", "cosine gap", "learning rate")
    first = [title for title in shown if title in groups]
    drawn = {}
    for title, named in groups.items():
        scale = 100.0 if "Dice" in title else 1.0
        beside = lines if title == "loss" else None
        uri = figures.curve(named, title, scale=scale, smooth=title == "loss", lines=beside)
        drawn[title] = html.figure(uri, f"{title} by step")
    others = [drawn[title] for title in groups if title not in first]
    return [html.grid(*(drawn[title] for title in first)), html.details("Further series", html.grid(*others))]


def what_was_read(manifest: Manifest | None, split: Mapping[str, Sequence[str]]) -> list[str]:
    """What the run read: volumes, subjects by part of the split, and how they were found."""
    if manifest is None:
        return []
    cases = manifest.cases
    by_part = ", ".join(f"{len(subjects)} {part}" for part, subjects in split.items() if isinstance(subjects, list))
    known = {
        "volumes": f"{len(cases)}, of {len(manifest.subjects)} subjects; {len(manifest.labelled)} have a label map",
        "subjects by part": by_part,
        "layout": manifest.layout,
        "how subjects were found": html.without_files(manifest.rule),
        "classes": ", ".join(f"{value} {name}" for value, name in sorted(manifest.label_names.items())),
        "modality": _counted(case.modality for case in cases),
        "orientation": _counted(case.orientation for case in cases if case.orientation),
    }
    ranges = []
    for title, values in (
        ("shape (voxels)", [case.shape for case in cases if len(case.shape) == 3]),
        ("spacing (mm)", [case.spacing for case in cases if len(case.spacing) == 3]),
    ):
        if values:
            low, middle, high = np.percentile(np.array(values, dtype=np.float64), (0, 50, 100), axis=0).tolist()
            ranges.append([title, html.readable(low), html.readable(middle), html.readable(high)])
    problems = Counter((html.without_files(each.what), each.remedy, each.aside) for each in manifest.problems)
    trouble = [
        [what, "set aside" if aside else "used all the same", html.without_files(remedy), count]
        for (what, remedy, aside), count in problems.most_common()
    ]
    parts = [html.facts(known), html.table(["", "smallest", "median", "largest"], ranges)]
    if trouble:
        listed = html.table(["what", "then", "remedy", "files"], trouble, text_columns=3)
        where = html.paragraph("Which files: manifest.json, beside this report.", "small")
        parts.append(html.subsection("Problems", listed, where))
    return parts


def how_it_was_made(config: Mapping[str, Any], provenance: Mapping[str, Any]) -> list[str]:
    """The provenance of a run, and its options behind a click."""
    return [
        html.facts({key.replace("_", " "): safe(value) for key, value in provenance.items()}),
        html.details("Every option", html.facts({key: safe(value) for key, value in config.items()})),
    ]


def logged_warnings(run: Path, manifest: Manifest | None, most: int = 8) -> list[str]:
    """Warnings and errors of `log.txt`, each once, without time stamps and file names."""
    if not (run / "log.txt").exists():
        return []
    text = (run / "log.txt").read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"^.*?\b(?:WARNING|Warning|ERROR)\b[\s:|\]-]*(.+)$", text, flags=re.MULTILINE)
    cases, problems = (manifest.cases, manifest.problems) if manifest else ((), ())
    names = {problem.file for problem in problems} | {
        name for case in cases for name in (*case.image, *case.label_files)
    }
    lines = list(dict.fromkeys(html.without_files(line.strip(), names) for line in found))
    return lines[:most] + ([f"{len(lines) - most} further warnings are in log.txt"] if len(lines) > most else [])


def safe(value: Any) -> str:
    """An option as text, each path cut down to its last part."""
    return html.last_parts(html.readable(value))


def _counted(values: Iterable[Any]) -> str:
    return ", ".join(f"{value} ({count})" for value, count in Counter(values).most_common())


def _metric_title(metric: str, scores: Mapping[str, Any]) -> str:
    tolerance = f" at {scores['tolerance_mm']:g} mm" if metric == "nsd" else ""
    return f"{MEASURES[metric].title} ({MEASURES[metric].unit}){tolerance}"


def _cell(value: float, metric: str) -> str:
    measure = MEASURES[metric]
    return f"{value * measure.scale:.{measure.digits}f}" if np.isfinite(value) else "-"

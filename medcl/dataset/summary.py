"""A summary of a manifest, as tables and as JSON."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medcl.dataset.case import Manifest, Problem
from medcl.io.units import rounded

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_PROBLEMS = 20


def summary_dict(manifest: Manifest) -> dict[str, Any]:
    """The facts of a manifest as plain JSON.

    Shapes and spacings are minimum, median and maximum along each array axis, in the files' own axis order (mm).
    """
    cases = manifest.cases
    intensities = [case.intensity for case in cases if case.intensity]
    return {
        "root": manifest.root,
        "layout": manifest.layout,
        "rule": manifest.rule,
        "cases": len(cases),
        "subjects": len(manifest.subjects),
        "labelled": len(manifest.labelled),
        "formats": _counts(case.format for case in cases),
        "modality": _counts(case.modality for case in cases),
        "orientation": _counts(case.orientation for case in cases),
        "split": _counts(case.split for case in cases if case.split),
        "shape": _spread([case.shape for case in cases]),
        "spacing_mm": _spread([case.spacing for case in cases]),
        "intensity": None
        if not intensities
        else {
            "min": min(low for low, _, _ in intensities),
            "median": float(np.median([middle for _, middle, _ in intensities])),
            "max": max(high for _, _, high in intensities),
        },
        "label_names": {str(value): name for value, name in manifest.label_names.items()},
        "notes": _counts(note for case in cases for note in case.notes),
        "set_aside": sum(problem.aside for problem in manifest.problems),
        "problems": [
            {"file": problem.file, "what": problem.what, "remedy": problem.remedy, "aside": problem.aside}
            for problem in manifest.problems
            if not problem.question
        ],
        "questions": [
            {"file": problem.file, "what": problem.what, "remedy": problem.remedy} for problem in manifest.questions
        ],
    }


def _counts(values: Any) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _spread(rows: Sequence[Sequence[float]]) -> dict[str, list[float]] | None:
    if not rows:
        return None
    table = np.array(rows, float)
    return {
        name: [rounded(float(number), 4) for number in function(table, axis=0)]
        for name, function in (("min", np.min), ("median", np.median), ("max", np.max))
    }


def print_summary(manifest: Manifest, console: Console | None = None) -> None:
    """Prints a table of what was found, then the problems, at most 20 of them."""
    from rich.console import Console as RichConsole
    from rich.markup import escape
    from rich.table import Table

    console = console or RichConsole()
    facts = summary_dict(manifest)
    table = Table(title=escape(manifest.root), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    unlabelled = facts["cases"] - facts["labelled"]
    table.add_row("cases", f"{facts['cases']} of {facts['subjects']} subjects")
    table.add_row("labels", f"{facts['labelled']} labelled, {unlabelled} without a label")
    for name in ("formats", "modality", "orientation", "split"):
        if facts[name]:
            table.add_row(name, ", ".join(f"{key} {count}" for key, count in facts[name].items()))
    for name, unit in (("shape", ""), ("spacing_mm", " mm")):
        if facts[name]:
            lines = [_line(key, row, unit) for key, row in facts[name].items()]
            table.add_row(name.removesuffix("_mm"), "\n".join(lines))
    if facts["intensity"]:
        low, middle, high = (f"{facts['intensity'][key]:.6g}" for key in ("min", "median", "max"))
        table.add_row("intensity", f"{low} to {high}, median {middle}")
    if manifest.label_names:
        named = ", ".join(f"{value} {name}" for value, name in manifest.label_names.items())
        table.add_row("label names", escape(named))
    table.add_row("rule", escape(f"{manifest.layout}: {manifest.rule}"))
    for note, count in facts["notes"].items():
        table.add_row("note", escape(f"{note} ({count} {'case' if count == 1 else 'cases'})"))
    console.print(table)

    if manifest.questions:
        several = "questions" if manifest.questions[1:] else "question"
        console.print(f"[bold]{len(manifest.questions)} {several}[/bold], which a table or --yes answers:")
        for _, line in grouped(manifest.questions):
            console.print(f"  [cyan]asks[/cyan]    {escape(line)}", soft_wrap=True)
    problems = [problem for problem in manifest.problems if not problem.question]
    if problems:
        aside = facts["set_aside"]
        console.print(f"[bold]{len(problems)} problems[/bold], {aside} files set aside:")
        # What was set aside comes before mere warnings.
        kinds = grouped(sorted(problems, key=lambda problem: not problem.aside))
        for is_aside, line in kinds[:SHOWN_PROBLEMS]:
            mark = "[red]aside[/red]  " if is_aside else "[yellow]warning[/yellow]"
            console.print(f"  {mark} {escape(line)}", soft_wrap=True)
        if len(kinds) > SHOWN_PROBLEMS:
            console.print(f"  and {len(kinds) - SHOWN_PROBLEMS} more, all in manifest.json")


def grouped(problems: Iterable[Problem]) -> list[tuple[bool, str]]:
    """A line for each kind of problem, in the order of the first of its kind, and whether its files were set aside.

    Problems of one kind say the same and mend the same way, save for numbers and the names of files.
    """
    kinds: dict[tuple[bool, str, str], list[Problem]] = defaultdict(list)
    for problem in problems:
        kinds[(problem.aside, _kind(problem.what, problem.file), _kind(problem.remedy, problem.file))].append(problem)
    lines = []
    for (aside, *_), same in kinds.items():
        more = f" ({len(same) - 1} more files likewise)" if len(same) > 2 else ""
        lines += [(aside, f"{problem}{more}") for problem in (same[:1] if more else same)]
    return lines


def _kind(text: str, file: str) -> str:
    """A sentence without the numbers and file names in it."""
    words = text.replace(file, "").split()
    return " ".join(
        "" if "/" in word or "." in word.rstrip(".,;") or any(map(str.isdigit, word)) else word for word in words
    )


def _line(name: str, numbers: Sequence[float], unit: str) -> str:
    return f"{name:<6} " + " x ".join(f"{number:g}" for number in numbers) + unit

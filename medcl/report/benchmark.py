"""The page of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medcl.efficiency.table import describe_labels, table
from medcl.report import page as html
from medcl.report import sections
from medcl.report.efficiency_figures import arms_plot, efficiency_plot
from medcl.runtime.files import write_text
from medcl.runtime.run import read_config

FEWEST_TO_DRAW = 2  # numbers of labels below which a curve says nothing


def write_benchmark_report(out: Path, result: Mapping[str, Any]) -> Path:
    """Writes `report.html` of a benchmark into `out`.

    Args:
        out: folder of the benchmark.
        result: what `benchmark` returned.

    Returns:
        The report's path.
    """
    head, lines = table(result)
    config = read_config(out)
    shared = {key: sections.safe(config[key]) for key in ("finetune", "by_labels", "pretrain") if config.get(key)}
    arms = {name: sections.safe(arm) or "from random weights" for name, arm in config["arms"].items()}
    curve = ""
    if len(result["labels"]) >= FEWEST_TO_DRAW:
        alt = "Dice of every arm over the number of labelled subjects"
        curve = html.figure(efficiency_plot(result), alt, f"{alt}, with 95 % intervals.", large=True)
    differences = [
        html.subsection(
            f"At {describe_labels(labels)}", html.figure(arms_plot(result, labels), f"differences at {labels}")
        )
        for labels in result["labels"]
        if any(entry["labels"] == labels and "difference" in entry for entry in result["entries"])
    ]
    stamps = [*result["unchecked"], *result["warnings"]]
    body = [
        html.warnings(stamps),
        html.section("What came out", html.bullets([f"{line}." for line in result["sentences"]])),
        html.section("If absent structures counted otherwise", html.bullets(result.get("sensitivity", []))),
        html.section("Label efficiency", curve),
        html.section("The numbers", html.table(head, lines, text_columns=2)),
        html.section(f"Every arm minus {result['baseline']}", *differences),
        html.section(
            "How it was measured",
            html.bullets(result["how"]),
            html.details("Arms", html.facts(arms)),
            html.details("What all arms share", html.facts(shared)),
        ),
    ]
    about = f"{result['draws']} draws, {result['subjects']} subjects"
    path = Path(out) / "report.html"
    write_text(path, html.page("Does pretraining help?", about, body))
    return path

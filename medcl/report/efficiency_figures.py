"""Figures of a benchmark: label-efficiency curves, and every arm against the baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from medcl.evaluation.metrics import MEASURES
from medcl.report.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, literal, new_figure, plain, to_uri


def efficiency_plot(result: Mapping[str, Any]) -> str:
    """Dice of every arm over the number of labelled subjects, with intervals; `all` stands at the right."""
    figure = new_figure(7.2, 3.8)
    axes = figure.add_subplot()
    places = {labels: place for place, labels in enumerate(result["labels"])}
    arms, spread = result["arms"], min(0.24, 0.05 * len(places))  # beside each other: no interval hides another
    for i, (arm, colour) in enumerate(zip(arms, (GREY, BLUE, ORANGE, GREEN, RED, SKY, PURPLE) * 8, strict=False)):
        entries = [entry for entry in result["entries"] if entry["arm"] == arm]
        values = np.array([[_number(entry["dice"][key]) for key in ("low", "estimate", "high")] for entry in entries])
        values = values * MEASURES["dice"].scale
        shift = 0.0 if len(arms) == 1 else spread * (i / (len(arms) - 1) - 0.5)
        x = [places[entry["labels"]] + shift for entry in entries]
        axes.vlines(x, values[:, 0], values[:, 2], color=colour, linewidth=1.5, alpha=0.7)
        axes.plot(x, values[:, 1], color=colour, linewidth=1.5, marker="o", markersize=5, label=literal(arm))
    axes.set_xticks(range(len(places)), list(places))
    axes.set_xlim(-0.3, len(places) - 0.7)
    axes.set_xlabel("labelled subjects", fontsize=8)
    axes.set_ylabel("Dice (%), mean and 95 % interval", fontsize=8)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    plain(axes)
    return to_uri(figure)


def arms_plot(result: Mapping[str, Any], labels: str) -> str:
    """Every arm's difference to the baseline at one number of labels, with intervals."""
    entries = [entry for entry in result["entries"] if entry["labels"] == labels and "difference" in entry]
    figure = new_figure(7.2, 0.85 + 0.34 * len(entries))
    axes = figure.add_subplot()
    axes.axvline(0, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    for i, entry in enumerate(entries):
        low, middle, high = (
            _number(entry["difference"][key]) * MEASURES["dice"].scale for key in ("low", "estimate", "high")
        )
        colour = {"ahead": BLUE, "behind": ORANGE}.get(entry["verdict"], GREY)
        axes.plot([low, high], [i, i], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot([middle], [i], "o", color=colour, markersize=7, markeredgecolor="white")
    axes.set_yticks(range(len(entries)), [literal(entry["arm"]) for entry in entries])
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.set_xlabel(f"Dice points minus {literal(result['baseline'])}; blue is ahead, orange behind", fontsize=8)
    plain(axes)
    return to_uri(figure)


def _number(value: float | None) -> float:
    return math.nan if value is None else value

"""Figures of a report, as data URIs. Drawn on matplotlib `Figure` objects: no window, no global state."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medcl.errors import MedclError
from medcl.evaluation.metrics import MEASURES
from medcl.runtime.run import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind and in greyscale.
BLUE, SKY, ORANGE, GREY = "#0072b2", "#56b4e9", "#e69f00", "#5a6572"
GREEN, RED, PURPLE = "#009e73", "#d55e00", "#cc79a7"
Floats = NDArray[np.float64]
Series = tuple[Floats, Floats]
_MOST_POINTS = 600


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that draws without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_uri(figure: Figure, kind: str = "svg", dpi: int = 150) -> str:
    """The figure as a data URI: `svg` for lines, `png` for images. Equal figures give equal bytes."""
    import matplotlib

    stream = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "medcl"}):
        figure.savefig(stream, format=kind, dpi=dpi, metadata=metadata)
    mime = "image/svg+xml" if kind == "svg" else f"image/{kind}"
    return f"data:{mime};base64,{base64.b64encode(stream.getvalue()).decode()}"


def read_series(run: Path) -> dict[str, Series]:
    """Steps and values of each series in a run's `metrics.csv`, without blanks and what is not finite.

    Raises:
        MedclError: the file is not such a table.
    """
    try:
        rows = read_metrics(run)
        names = dict.fromkeys(name for row in rows for name in row if name != "step")
        points = {name: [(row["step"], row[name]) for row in rows if name in row] for name in names}
    except (KeyError, ValueError, TypeError) as error:
        raise MedclError(f"is not a table of series by step ({error})", run / "metrics.csv", "Delete it.") from None
    series: dict[str, Series] = {}
    for name, pairs in points.items():
        table = np.array(pairs, dtype=np.float64)
        table = table[np.isfinite(table).all(axis=1)]
        if len(table):
            series[name] = table[:, 0], table[:, 1]
    return series


FAR = 2.0  # a level this many times above a curve is written, not drawn


def curve(
    named: Mapping[str, Series], label: str, *, scale: float = 1.0, smooth: bool = False,
    lines: Mapping[str, Series] | None = None,
) -> str:  # fmt: skip
    """One or a few series over optimiser steps.

    Args:
        named: the series; the first is drawn strongest.
        label: title of the panel.
        scale: factor applied to the values.
        smooth: draw a running median over the raw values, for noisy series.
        lines: levels to compare with, dashed.
    """
    figure = new_figure(3.5, 2.3)
    axes = figure.add_subplot()
    top = max(float(np.abs(values * scale).max()) for _, values in named.values())
    for (name, (steps, values)), dashes in zip((lines or {}).items(), ("--", ":", "-.") * 3, strict=False):
        level = (_running_median(values, max(5, len(values) // 5)) if len(values) >= 10 else values) * scale
        if np.abs(level).min() > FAR * top:  # it would flatten the curve
            axes.plot(
                [], [], color=GREY, linewidth=1.0, linestyle=dashes, label=f"{name}: {np.median(level):.3g}, above"
            )
            continue
        axes.plot(*_thinned(steps, level), color=GREY, linewidth=1.0, linestyle=dashes, label=name)
    for (name, (steps, values)), colour in zip(named.items(), (BLUE, ORANGE, GREY, SKY) * 8, strict=False):
        values = values * scale
        if smooth and len(values) >= 50:
            axes.plot(*_thinned(steps, values), color=colour, linewidth=0.6, alpha=0.3)
            values = _running_median(values, max(5, len(values) // 50))
        marker = "o" if len(values) <= 30 else None
        axes.plot(*_thinned(steps, values), color=colour, linewidth=1.5, marker=marker, markersize=3, label=name)
    if len(named) > 1 or lines:
        axes.legend(fontsize=7, frameon=False)
    axes.set_xlabel("step", fontsize=8)
    plain(axes, label)
    return to_uri(figure)


def score_strips(rows: Sequence[Mapping[str, Any]], metric: str = "dice") -> str:
    """The score of every case, a line of dots per class, with the median.

    Args:
        rows: rows of `evaluation.csv`.
        metric: key of `MEASURES`.
    """
    measure = MEASURES[metric]
    names = list(dict.fromkeys(str(row["name"]) for row in rows))
    figure = new_figure(7.2, 0.75 + 0.42 * len(names))
    axes = figure.add_subplot()
    jitter = np.random.default_rng(0)
    for i, name in enumerate(names):
        values = np.array([row[metric] for row in rows if row["name"] == name], dtype=np.float64) * measure.scale
        values = values[np.isfinite(values)]
        axes.scatter(values, i + jitter.uniform(-0.18, 0.18, len(values)), s=14, color=BLUE, alpha=0.45, linewidth=0)
        if len(values):
            axes.plot([np.median(values)] * 2, [i - 0.32, i + 0.32], color="black", linewidth=1.5)
    axes.set_yticks(range(len(names)), [literal(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(f"{measure.title} ({measure.unit})", fontsize=8)
    plain(axes)
    return to_uri(figure)


def difference_plot(result: Mapping[str, Any], metric: str = "dice") -> str:
    """Paired differences with their intervals, overall and per class, against the line of no difference."""
    measure, block = MEASURES[metric], result["metrics"][metric]
    entries = [("mean", block["mean"])] + [(entry["name"], entry) for entry in block["classes"]]
    figure = new_figure(7.2, 0.85 + 0.36 * len(entries))
    axes = figure.add_subplot()
    axes.axvline(0, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    for i, (_, entry) in enumerate(entries):
        low, estimate, high = (
            math.nan if entry[key] is None else entry[key] * measure.scale for key in ("low", "estimate", "high")
        )
        axes.plot([low, high], [i, i], color=BLUE, linewidth=3.5 if i == 0 else 2, solid_capstyle="butt")
        axes.plot([estimate], [i], "o", color=BLUE, markersize=8 if i == 0 else 6, markeredgecolor="white")
    axes.set_yticks(range(len(entries)), [literal(name) for name, _ in entries])
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.set_ylim(len(entries) - 0.5, -0.5)
    first, second = map(literal, result["names"])
    better = "right" if measure.higher_is_better else "left"
    axes.set_xlabel(f"{first} minus {second} ({measure.of}); {better} of the line, {first} is ahead", fontsize=8)
    plain(axes)
    return to_uri(figure)


def subject_scatter(result: Mapping[str, Any]) -> str:
    """Each test subject in both arms; above the diagonal the first arm is ahead."""
    measure, (first, second) = MEASURES["dice"], map(literal, result["names"])
    points = np.array([[row["second"], row["first"]] for row in result["subjects"]]).reshape(-1, 2) * measure.scale
    figure = new_figure(3.6, 3.5)
    axes = figure.add_subplot()
    if len(points):
        low, high = float(points.min()), float(points.max())
        margin = max(1.0, 0.06 * (high - low))
        ends = (low - margin, min(100.5, high + margin))
        axes.plot(ends, ends, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes.scatter(points[:, 0], points[:, 1], s=18, color=BLUE, alpha=0.6, linewidth=0)
        axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.set_xlabel(f"{second}, Dice (%)", fontsize=8)
    axes.set_ylabel(f"{first}, Dice (%)", fontsize=8)
    plain(axes, "a dot per test subject, mean over draws")
    return to_uri(figure)


def subject_differences(result: Mapping[str, Any]) -> str:
    """The subjects' differences in order of size: who gains, who loses, and by how much."""
    values = np.sort([row["difference"] * MEASURES["dice"].scale for row in result["subjects"]])[::-1]
    figure = new_figure(3.6, 3.5)
    axes = figure.add_subplot()
    axes.bar(range(1, len(values) + 1), values, color=np.where(values >= 0, BLUE, ORANGE), width=0.8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("test subjects, by difference", fontsize=8)
    axes.set_ylabel("Dice points", fontsize=8)
    gained = int(np.count_nonzero(values > 0))
    plain(axes, literal(f"{result['names'][0]} is better in {gained} of {len(values)}"))
    return to_uri(figure)


def plain(axes: Axes, title: str = "") -> None:
    """Gives axes the look of all figures: no frame above and to the right, a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelsize=8, color=GREY)
    axes.grid(axis="both", color="#e8ebee", linewidth=0.6)
    axes.set_axisbelow(True)
    if title:
        axes.set_title(title, fontsize=9, loc="left")


def literal(text: Any) -> str:
    """Text that matplotlib must not read as mathematics."""
    return str(text).replace("$", r"\$")


def _thinned(steps: Floats, values: Floats) -> Series:
    """At most `_MOST_POINTS` points, so that a long run does not make a large file."""
    every = -(-len(steps) // _MOST_POINTS)
    return steps[::every], values[::every]


def _running_median(values: Floats, width: int) -> Floats:
    from scipy.ndimage import median_filter

    return np.asarray(median_filter(values, size=width, mode="nearest"), dtype=np.float64)

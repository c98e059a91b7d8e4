"""Predicted and reference outlines over the image, on three orthogonal planes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medcl.dataset.body import AIR
from medcl.dataset.case import Case, Manifest
from medcl.dataset.labels import read_label
from medcl.errors import MedclError
from medcl.io.geometry import to_canonical
from medcl.io.volumes import read_volume
from medcl.report.figures import ORANGE, SKY, literal, new_figure, to_uri

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Labels = NDArray[np.int32]
# Of a canonical (RAS) array: name, axis cut, and what lies left, right, below and above in radiological display, where
# the reader faces the patient. In all three planes the horizontal axis is the lower one left, run backwards.
PLANES = (("axial", 2, "RLPA"), ("coronal", 1, "RLIS"), ("sagittal", 0, "APIS"))
_MARGIN_MM = 12.0


@dataclass(frozen=True)
class Overlay:
    """A case in canonical orientation.

    Attributes:
        image: `(X, Y, Z)`.
        reference: labels `(X, Y, Z)`.
        predictions: labels `(X, Y, Z)` by the name of what predicted them.
        spacing: mm along the three axes.
    """

    image: NDArray[Any]
    reference: Labels
    predictions: Mapping[str, Labels]
    spacing: tuple[float, ...]


def load_overlay(manifest: Manifest, case: Case, predictions: Mapping[str, Path]) -> Overlay:
    """Reads a case's image, reference and predictions.

    Raises:
        MedclError: a file cannot be read, or their grids do not agree.
    """
    if not case.is_labelled:
        raise MedclError("has no reference", case.id)
    image = to_canonical(read_volume(manifest.image_paths(case), case.channel))
    maps = [read_label(manifest, case), *(read_volume([path]) for path in predictions.values())]
    labels = [np.rint(to_canonical(each).array).astype(np.int32) for each in maps]
    if any(each.shape != image.shape for each in labels):
        raise MedclError("image, reference and prediction have different shapes", case.id)
    named = dict(zip(predictions, labels[1:], strict=True))
    return Overlay(np.asarray(image.array), labels[0], named, image.spacing)


def draw_overlay(overlay: Overlay, titles: Mapping[str, str]) -> str:
    """One row of three planes per prediction: grey image, reference outline in blue, prediction in orange.

    The planes cut where the reference is largest, and show the structure with a margin.

    Args:
        overlay: the case.
        titles: a title for each prediction.
    """
    from matplotlib.lines import Line2D

    where = [_largest_cut(overlay, axis) for _, axis, _ in PLANES]
    views = [_view(overlay, axis) for _, axis, _ in PLANES]
    ratios = [width / height for (width, height) in ((abs(x[0] - x[1]), y[1] - y[0]) for x, y in views)]
    n = len(overlay.predictions)
    row_height = min(3.2, 7.0 / sum(ratios))
    figure = new_figure(7.2, n * (row_height + 0.3) + 0.25)
    rows = figure.subfigures(n, 1, squeeze=False)[:, 0]
    window = _window(overlay.image)
    for row, (name, prediction) in zip(rows, overlay.predictions.items(), strict=True):
        row.suptitle(literal(titles.get(name, name)), fontsize=9, x=0.012, ha="left")
        panels: Sequence[Axes] = row.subplots(1, 3, width_ratios=ratios)
        for i, (axes, (plane, axis, letters)) in enumerate(zip(panels, PLANES, strict=True)):
            across, up = (overlay.spacing[other] for other in range(3) if other != axis)
            image = np.take(overlay.image, where[i], axis=axis)
            extent = (-across / 2, (image.shape[0] - 0.5) * across, -up / 2, (image.shape[1] - 0.5) * up)
            axes.imshow(image.T, cmap="gray", origin="lower", extent=extent, vmin=window[0], vmax=window[1])
            _outline(axes, np.take(overlay.reference, where[i], axis=axis), (across, up), SKY, 2.2)
            _outline(axes, np.take(prediction, where[i], axis=axis), (across, up), ORANGE, 1.1)
            axes.set(xlim=views[i][0], ylim=views[i][1], aspect="equal", xticks=[], yticks=[])
            axes.set_facecolor("black")
            _letters(axes, letters)
            axes.set_xlabel(f"{plane}, slice {where[i] + 1} of {overlay.image.shape[axis]}", fontsize=7)
    handles = [Line2D([], [], color=SKY, linewidth=2.2), Line2D([], [], color=ORANGE, linewidth=1.1)]
    figure.legend(handles, ["reference", "prediction"], loc="upper right", ncols=2, fontsize=8, frameon=False)
    return to_uri(figure, "png")


def _largest_cut(overlay: Overlay, axis: int) -> int:
    """The slice across `axis` that holds most of the reference, or of a prediction where the reference is empty."""
    others = tuple(other for other in range(3) if other != axis)
    for labels in (overlay.reference, *overlay.predictions.values()):
        if labels.any():
            return int((labels != 0).sum(axis=others).argmax())
    return int(overlay.image.shape[axis] // 2)


def _view(overlay: Overlay, axis: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Limits in mm, horizontal (backwards) and vertical, of a plane's part around all outlines."""
    outlined = np.any([labels != 0 for labels in (overlay.reference, *overlay.predictions.values())], axis=0)
    limits = []
    for other in (each for each in range(3) if each != axis):
        size, mm = overlay.image.shape[other], overlay.spacing[other]
        along = np.flatnonzero(outlined.any(axis=tuple(each for each in range(3) if each != other)))
        first, last = (int(along[0]), int(along[-1])) if len(along) else (0, size - 1)
        margin = max(_MARGIN_MM, 0.35 * (last - first + 1) * mm)
        limits.append((max(-0.5 * mm, first * mm - margin), min((size - 0.5) * mm, last * mm + margin)))
    (low, high), vertical = limits
    return (high, low), vertical


def _window(image: NDArray[Any]) -> tuple[float, float]:
    """Grey levels from the 1st to the 99.5th percentile; of CT without the air, which would take most of them."""
    values = image[np.isfinite(image)]
    if values.size and values.min() <= AIR and (body := values[values > AIR]).size:
        values = body
    low, high = np.percentile(values, (1, 99.5)) if values.size else (0.0, 1.0)
    return float(low), float(high if high > low else low + 1)


def _outline(axes: Axes, labels: Labels, spacing: tuple[float, float], colour: str, width: float) -> None:
    """The outline of every class, closed at the image's border."""
    padded = np.pad(labels, 1)
    across, up = ((np.arange(size) - 1) * mm for size, mm in zip(padded.shape, spacing, strict=True))
    for value in np.unique(labels[labels != 0]):
        axes.contour(across, up, (padded == value).T.astype(float), levels=[0.5], colors=[colour], linewidths=width)


def _letters(axes: Axes, letters: str) -> None:
    from matplotlib.patheffects import withStroke

    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.02, "center", "bottom"))
    for letter, (x, y, ha, va) in zip(letters, (*places, (0.5, 0.98, "center", "top")), strict=True):
        axes.text(
            x,
            y,
            letter,
            ha=ha,
            va=va,
            transform=axes.transAxes,
            color="white",
            fontsize=8,
            path_effects=[withStroke(linewidth=1.5, foreground="black")],
        )

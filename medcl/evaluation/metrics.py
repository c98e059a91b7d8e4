"""Overlap and surface metrics of label maps: Dice, HD95 and normalised surface distance, in mm.

Definitions, so that numbers can be compared with other people's:

- The *surface* of a mask is its voxels that have a face neighbour outside it (what is beyond the image is outside);
  surface distances run between voxel centres, with the voxel spacing honoured. MONAI defines them so.
- *HD95* is the larger of the two directed 95th percentiles of surface distance (linear interpolation), in mm.
- *NSD* is the share of both surfaces, taken together, that lies within a tolerance of the other surface (Nikolov et
  al. 2018, arXiv:1809.04430), counted in surface voxels rather than in area elements.

Empty masks, where `outcome` says which rule was used:

=========  =========  ==========  ====  ====  ====
outcome    reference  prediction  dice  nsd   hd95
=========  =========  ==========  ====  ====  ====
present    some       some        >= 0  >= 0  >= 0
missed     some       none        0     0     NaN
invented   none       some        0     0     NaN
absent     none       none        NaN   NaN   NaN
=========  =========  ==========  ====  ====  ====

A NaN is left out of means and counted beside them; what an absent structure counts where runs are compared is said in
`absence`. A missed structure has no distance: a penalty such as the image
diagonal would make the mean depend on the field of view. Dice and NSD carry the penalty, and HD95 must be read
together with the number missed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]

OUTCOMES = ("present", "missed", "invented", "absent")


@dataclass(frozen=True)
class Measure:
    """How a metric is spoken of.

    Attributes:
        title: its name in tables.
        scale: factor from the stored value to the printed one.
        unit: unit of the printed value.
        of: unit of a printed difference.
        higher_is_better: False for distances.
        digits: decimals of the printed value.
    """

    title: str
    scale: float
    unit: str
    of: str
    higher_is_better: bool
    digits: int = 1


MEASURES: dict[str, Measure] = {
    "dice": Measure("Dice", 100.0, "%", "Dice points", True),
    "nsd": Measure("NSD", 100.0, "%", "NSD points", True),
    "hd95": Measure("HD95", 1.0, "mm", "mm HD95", False, 2),
}


def dice(prediction: Mask, reference: Mask) -> float:
    """Dice overlap `2|P∩R| / (|P| + |R|)` of two masks; NaN where both are empty."""
    total = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    return 2.0 * int(np.count_nonzero(prediction & reference)) / total if total else float("nan")


def surface(mask: Mask) -> Mask:
    """The voxels of a mask that have a face neighbour outside it."""
    return mask & ~ndimage.binary_erosion(mask)


def surface_distances(
    prediction: Mask, reference: Mask, spacing: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance in mm from each surface voxel of one mask to the nearest surface voxel of the other.

    Args:
        prediction: `(X, Y, Z)`, not empty.
        reference: `(X, Y, Z)`, not empty.
        spacing: mm along the three axes.

    Returns:
        The distances from the prediction's surface to the reference's, and the other way round; both one-dimensional.
    """
    box = _bounding_box(prediction | reference)
    of_prediction, of_reference = surface(prediction[box]), surface(reference[box])
    to_reference = ndimage.distance_transform_edt(~of_reference, sampling=tuple(spacing))
    to_prediction = ndimage.distance_transform_edt(~of_prediction, sampling=tuple(spacing))
    return to_reference[of_prediction], to_prediction[of_reference]


def segmentation_scores(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    classes: Mapping[int, str],
    spacing: Sequence[float],
    tolerance_mm: float = 1.0,
) -> list[dict[str, Any]]:
    """Scores one predicted label map, class by class; 0 is background and never scored.

    Args:
        prediction: integer labels `(X, Y, Z)`.
        reference: integer labels `(X, Y, Z)` on the same grid.
        classes: the name of each label value to score.
        spacing: mm along the three axes.
        tolerance_mm: surface distance that NSD forgives.

    Returns:
        One dict per class, in order of label value: `class`, `name`, `outcome` (see the module's table), `dice`,
        `hd95` (mm), `nsd`, `volume_pred_ml`, `volume_ref_ml`.

    Raises:
        ValueError: the shapes differ, the arrays are not integers in 3D, or a spacing or tolerance makes no sense.
    """
    if prediction.shape != reference.shape or prediction.ndim != 3:
        raise ValueError(f"label maps (X, Y, Z) of one shape are needed: {prediction.shape}, {reference.shape}")
    if prediction.dtype.kind not in "biu" or reference.dtype.kind not in "biu":
        raise ValueError(f"labels must be integers, not {prediction.dtype} and {reference.dtype}")
    if len(spacing) != 3 or not all(np.isfinite(mm) and mm > 0 for mm in spacing) or not tolerance_mm >= 0:
        raise ValueError(f"spacing must be three lengths > 0, the tolerance >= 0: {spacing}, {tolerance_mm}")
    millilitres = float(np.prod(spacing)) / 1000.0
    if np.any(either := (prediction != 0) | (reference != 0)):  # one crop serves all classes, however many
        box = _bounding_box(either)
        prediction, reference = prediction[box], reference[box]
    rows = []
    for value, name in sorted(classes.items()):
        if value == 0:
            continue
        predicted, true = prediction == value, reference == value
        n_predicted, n_true = int(np.count_nonzero(predicted)), int(np.count_nonzero(true))
        outcome = OUTCOMES[2 * (not n_true) + (not n_predicted)]
        hd95 = nsd = float("nan")
        if outcome == "present":
            distances = surface_distances(predicted, true, spacing)
            hd95 = max(float(np.percentile(each, 95)) for each in distances)
            # A hair's breadth of slack: 3 x 0.1 mm must count as within 0.3 mm.
            nsd = float(np.mean(np.concatenate(distances) <= tolerance_mm * (1 + 1e-9)))
        elif outcome != "absent":
            nsd = 0.0
        rows.append(
            {
                "class": int(value),
                "name": name,
                "outcome": outcome,
                "dice": dice(predicted, true),
                "hd95": hd95,
                "nsd": nsd,
                "volume_pred_ml": n_predicted * millilitres,
                "volume_ref_ml": n_true * millilitres,
            }
        )
    return rows


def _bounding_box(mask: Mask) -> tuple[slice, ...]:
    """The smallest box around the mask's voxels. Nothing outside the box of both masks is nearer than what is in it."""
    box = []
    for axis in range(mask.ndim):
        along = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(int(along[0]), int(along[-1]) + 1))
    return tuple(box)

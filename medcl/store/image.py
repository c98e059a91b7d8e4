"""A volume as the network sees it: cropped to the body, resampled, normalised; and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medcl.dataset.body import SATURATED, Body, body_of, box_of, foreground_box, outside_box, slices_of, widened
from medcl.dataset.checks import labelled_outside, whole_labels
from medcl.errors import MedclError
from medcl.io.geometry import Volume
from medcl.io.resample import resample_labels, resample_linear, resampled_affine
from medcl.store.plan import Plan

LARGEST = float(np.finfo(np.float16).max)
LUNG = -900.0  # HU; a CT's voxels above it within the body's box are tissue


@dataclass(frozen=True)
class PreparedImage:
    """A volume as the network sees it, and how to go back.

    Attributes:
        image: float32 (X, Y, Z) in RAS orientation, resampled and normalised.
        affine: of `image`, voxel to RAS+ mm.
        canonical_shape: voxels of the whole volume in RAS orientation before cropping.
        crop_start, crop_shape: the foreground box in that volume.
        told: what a user should know of it, and what can be done.
    """

    image: np.ndarray
    affine: np.ndarray
    canonical_shape: tuple[int, ...]
    crop_start: tuple[int, ...]
    crop_shape: tuple[int, ...]
    told: tuple[tuple[str, str], ...] = ()

    def restore(self, scores: np.ndarray) -> np.ndarray:
        """Class scores (K, x, y, z) on the grid of `image` to a map of class numbers on the canonical grid.

        It is uint8, or uint16 where there are more than 256 classes.
        """
        best = resample_linear(scores[0], self.crop_shape)
        inside = np.zeros(self.crop_shape, dtype=np.uint8 if len(scores) <= 256 else np.uint16)
        for value in range(1, len(scores)):  # a class at a time: the fine grid may be large
            score = resample_linear(scores[value], self.crop_shape)
            wins = score > best
            inside[wins] = value
            best = np.maximum(best, score)
        whole = np.zeros(self.canonical_shape, dtype=inside.dtype)
        whole[self._box()] = inside
        return whole

    def prepare_label(self, canonical: np.ndarray) -> np.ndarray:
        """A label map on the canonical grid to the grid of `image`: uint8, or uint16 where a value needs it."""
        return resample_labels(whole_labels(canonical[self._box()]), self.image.shape)

    def _box(self) -> tuple[slice, ...]:
        return tuple(slice(s, s + n) for s, n in zip(self.crop_start, self.crop_shape, strict=True))


def prepare_image(
    canonical: Volume, plan: Plan, clip: bool = True, label: np.ndarray | None = None
) -> PreparedImage:  # fmt: skip
    """Crops, resamples and normalises a volume that is in RAS orientation.

    Args:
        canonical: the volume, checked (finite, not constant).
        plan: spacing, normalisation and window.
        clip: limit intensities to the plan's range. Without, the scale is the same and what is outside stays: a bright
            spot of less than half a percent of the volume shows only then.
        label: label map on the same grid, of a volume to train on: what it labels stays in the crop. Without it, as in
            prediction, the image alone decides.

    Raises:
        MedclError: the body is nearly constant, so that scaled intensities do not fit the float16 of the store.
    """
    array = np.asarray(canonical.array, dtype=np.float32)
    if plan.n4 and plan.normalise != "ct":
        array = correct_bias(array, canonical.spacing)
    body = body_of(array, plan.window if plan.normalise == "ct" else None)
    low, high = body.low, body.high
    mask = array > body.threshold
    box = foreground_box(mask)
    seen = slices_of(box)
    tissue = array[seen] > LUNG if plan.normalise == "ct" else mask[seen]
    told = _saturation(body, array[seen], tissue, plan, "the body")
    if label is not None:
        told += _saturation(body, array, label > 0, plan, "what is labelled")
    if label is not None and (outside := outside_box(label > 0, box)):
        told.append(labelled_outside(outside, int(np.count_nonzero(label))))
        labelled = box_of(label > 0)
        assert labelled is not None
        box = widened(box, labelled, array.shape)
    cropped = array[slices_of(box)]
    extent = np.asarray(cropped.shape) * canonical.spacing
    shape = np.maximum(np.round(extent / plan.spacing), 1).astype(int).tolist()
    image = np.clip(resample_linear(np.clip(cropped, low, high), shape), low, high)
    shown = image if clip else resample_linear(cropped, shape)
    if plan.normalise == "ct":
        image = 2 * (shown - low) / (high - low) - 1
    else:
        scale = image[image > body.tissue]
        scale = scale if scale.size and scale.std() > 0 else image
        image = (shown - scale.mean()) / max(float(scale.std()), 1e-6 * float(high - low))
    if not np.abs(image).max() <= (LARGEST if clip else np.inf):
        raise MedclError(
            f"voxels from {array.min():g} to {array.max():g} cannot be scaled: the body is as good as constant", None,
            "Check that it is a scan and not a mask, or leave it out.",
        )  # fmt: skip
    affine = np.array(canonical.affine, dtype=float)
    affine[:3, 3] += affine[:3, :3] @ np.asarray(box[0], float)
    return PreparedImage(
        image.astype(np.float32),
        resampled_affine(affine, cropped.shape, shape),
        tuple(array.shape),
        tuple(int(s) for s in box[0]),
        tuple(cropped.shape),
        tuple(told),
    )


def _saturation(body: Body, array: np.ndarray, mask: np.ndarray, plan: Plan, whose: str) -> list[tuple[str, str]]:
    """Says where more than a few percent of the voxels of `mask` lie outside the range of intensities."""
    share = body.saturated(array, mask)
    if share <= SATURATED:
        return []
    if plan.normalise == "ct":
        what = f"the plan's window of {body.low:g} to {body.high:g} HU"
        return [(f"{share:.0%} of {whose} lies outside {what}",
                 "Where contrast is needed there, edit `window` in the plan and pass it with --plan.")]  # fmt: skip
    what = f"the volume's range of {body.low:.5g} to {body.high:.5g}"
    return [(f"{share:.0%} of {whose} lies outside {what}", "Look at it: prepared, those voxels are all equal.")]


def correct_bias(array: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """N4 bias-field correction (Tustison et al. 2010) fitted on a four times coarser grid, as is usual."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array.T)
    image.SetSpacing([float(s) for s in spacing])
    shrink = [max(1, min(4, n // 8)) for n in array.shape]
    small = sitk.Shrink(image, shrink)
    mask = sitk.OtsuThreshold(small, 0, 1, 200)
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetConvergenceThreshold(0.001)
    n4.SetMaximumNumberOfIterations([50] * 4)
    # N4 works on logarithms
    lowest = float(array.min())
    n4.Execute(sitk.Cast(small, sitk.sitkFloat32) - lowest + 1.0, mask)
    field = np.exp(sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(image)).T)
    return ((array - lowest) / np.maximum(field, 1e-3) + lowest).astype(np.float32)

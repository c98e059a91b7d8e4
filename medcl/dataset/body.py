"""Where the body lies in a volume: its intensities, the voxels above the field around it, the box that holds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FOREGROUND_SHARE = 0.05  # of the range between the low and the high percentile
AIR = -500.0  # HU
MARGIN = 2  # voxels kept around the body
SATURATED = 0.05  # share of the body's voxels that may lie beyond the range they are clipped to
COARSE = 128  # cells along an axis in which connected body is looked for
FILLED = 0.25  # share of a cell's voxels that must be foreground
THICK = 3  # voxels
PART = 0.01  # share of the foreground that a connected part must hold to count as body: less is noise or a marker

Box = tuple[np.ndarray, np.ndarray]  # first and past-last voxel along each axis


@dataclass(frozen=True)
class Body:
    """What sets the body apart from the field around it.

    Attributes:
        low, high: the range that intensities are clipped to.
        threshold: voxels above it are foreground, which cropping keeps.
        tissue: voxels above it are the body that intensities are scaled by.
    """

    low: float
    high: float
    threshold: float
    tissue: float

    def saturated(self, array: np.ndarray, mask: np.ndarray) -> float:
        """Share of the voxels of `mask`, a part of `array`, that lies outside the range."""
        values = array[mask]
        outside = np.count_nonzero(values < self.low) + np.count_nonzero(values > self.high)
        return outside / max(values.size, 1)


def body_of(array: np.ndarray, window: Sequence[float] | None = None) -> Body:
    """Tells the body from the field around it.

    Intensities are clipped to the 0.5 and 99.5 percentiles of the volume. Where the body fills so little of it that
    this would cut off more than 5 % of the body's voxels, the upper percentile is that of the body alone.

    Args:
        array: the volume (X, Y, Z), finite.
        window: HU to clip to, of a CT; None takes the range from the volume.
    """
    if window is not None:
        return Body(window[0], window[1], AIR, AIR)
    low, high = np.percentile(array, (0.5, 99.5))
    few = thinned(array)
    split = otsu(few)
    small = bool(high > low) and np.count_nonzero(few > high) > SATURATED * np.count_nonzero(few > split)
    if small:
        high = np.float64(np.percentile(array[array > split], 99.5))
    if high <= low:  # nearly constant: a few voxels carry all the contrast
        low, high = float(array.min()), float(array.max())
    threshold = low + FOREGROUND_SHARE * (high - low)
    return Body(low, high, threshold, max(threshold, split) if small else threshold)


def thinned(array: np.ndarray, most: int = 1 << 22) -> np.ndarray:
    """Every n-th voxel along each axis, so that about `most` are left."""
    step = math.ceil((array.size / most) ** (1 / 3) - 1e-9)
    return array[::step, ::step, ::step] if step > 1 else array


def otsu(array: np.ndarray) -> float:
    """The threshold that best splits intensities into two classes (Otsu 1979); the brightest 0.01 % count as equal."""
    low, high = np.percentile(array, (0.5, 99.99))
    if not high > low:
        return float(low)
    count, edges = np.histogram(np.clip(array, low, high), 512, (low, high))
    middle = (edges[1:] + edges[:-1]) / 2
    below, above = np.cumsum(count), count.sum() - np.cumsum(count)
    total = np.cumsum(count * middle)
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = below * above * (total / below - (total[-1] - total) / above) ** 2
    return float(edges[1 + int(np.nanargmax(apart))])


def foreground_box(mask: np.ndarray) -> Box:
    """The box to crop to: first and past-last voxel along each axis, with a margin of `MARGIN` voxels.

    It holds the planes with more than 1 % foreground, and beyond them the connected body where that is at least
    `THICK` voxels thick. Thinner is the noise of the field.

    Args:
        mask: the foreground (X, Y, Z).
    """
    start, stop = np.zeros(3, dtype=int), np.asarray(mask.shape)
    for axis in range(3):
        planes = mask.mean(axis=tuple(i for i in range(3) if i != axis)) > 0.01
        if planes.any():
            found = np.flatnonzero(planes)
            start[axis] = max(found[0] - MARGIN, 0)
            stop[axis] = min(found[-1] + 1 + MARGIN, mask.shape[axis])
    parts = connected_box(mask)
    return (start, stop) if parts is None else _with_body((start, stop), parts, mask)


def _with_body(box: Box, parts: Box, mask: np.ndarray) -> Box:
    """The box, moved outwards to the planes of the connected body that lie beyond it."""
    start, stop = box[0].copy(), box[1].copy()
    for axis in range(3):
        for first, last in ((parts[0][axis], box[0][axis]), (box[1][axis], parts[1][axis])):
            if first >= last:
                continue
            low = max(first - THICK, 0)  # thickness shows only with what lies within the box
            slab = list(slices_of(parts))
            slab[axis] = slice(low, last + THICK)
            planes = low + _thick_planes(mask[tuple(slab)], axis)
            planes = planes[(first <= planes) & (planes < last)]
            if planes.size:
                start[axis] = min(start[axis], max(planes[0] - MARGIN, 0))
                stop[axis] = max(stop[axis], min(planes[-1] + 1 + MARGIN, mask.shape[axis]))
    return start, stop


def _thick_planes(mask: np.ndarray, axis: int) -> np.ndarray:
    """The planes along an axis in which something is at least `THICK` voxels thick: what an opening leaves."""
    from scipy import ndimage

    opened = ndimage.binary_opening(mask, np.ones([min(THICK, n) for n in mask.shape]))
    return np.flatnonzero(opened.any(axis=tuple(i for i in range(3) if i != axis)))


def widened(box: Box, other: Box, shape: Sequence[int]) -> Box:
    """The box, moved outwards where `other` sticks out of it, and then with a margin around `other`."""
    start = np.where(other[0] < box[0], np.maximum(other[0] - MARGIN, 0), box[0])
    stop = np.where(other[1] > box[1], np.minimum(other[1] + MARGIN, shape), box[1])
    return start, stop


def box_of(mask: np.ndarray) -> Box | None:
    """The smallest box around the voxels of a mask; None where it has none."""
    found = [np.flatnonzero(mask.any(axis=tuple(i for i in range(3) if i != axis))) for axis in range(3)]
    if not found[0].size:
        return None
    return np.array([f[0] for f in found]), np.array([f[-1] + 1 for f in found])


def labelled_outside(array: np.ndarray, label: np.ndarray, ct: bool) -> int:
    """How many labelled voxels of a volume lie outside the box that it is cropped to.

    Args:
        array: the volume (X, Y, Z).
        label: its label map, of the same shape.
        ct: whether the volume is a CT in HU.
    """
    body = body_of(array.astype(np.float32, copy=False), (AIR, -AIR) if ct else None)
    return outside_box(label > 0, foreground_box(array > body.threshold))


def outside_box(mask: np.ndarray, box: Box) -> int:
    """How many voxels of a mask lie outside a box."""
    return int(np.count_nonzero(mask)) - int(np.count_nonzero(mask[slices_of(box)]))


def slices_of(box: Box) -> tuple[slice, ...]:
    """The box as an index of an array."""
    return tuple(slice(int(a), int(b)) for a, b in zip(*box, strict=True))


def connected_box(mask: np.ndarray) -> Box | None:
    """The box around the connected parts that hold at least 1 % of the foreground, to the cell; None without any.

    Parts are found on a grid of at most 128 cells along an axis: a large volume costs little more than a small one.
    """
    voxels, labels, size = _parts(mask)
    kept = np.flatnonzero(voxels >= PART * voxels.sum())
    kept = kept[(kept > 0) & (voxels[kept] > 0)]
    found = box_of(np.isin(labels, kept)) if kept.size else None
    return None if found is None else (found[0] * size, np.minimum(found[1] * size, mask.shape))


def _parts(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels of every connected part (part 0: those in none), the part of every cell, and voxels along its edges."""
    from scipy import ndimage

    size = np.array([math.ceil(n / COARSE) for n in mask.shape])
    count = mask.view(np.uint8) if mask.dtype == bool else mask.astype(np.uint8)
    for axis in range(3):
        count = _summed(count, int(size[axis]), axis)
    labels, _ = ndimage.label(count >= FILLED * size.prod(), np.ones((3, 3, 3)))
    return np.bincount(labels.ravel(), count.ravel()), labels, size


def _summed(count: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Sums of `size` neighbours along an axis; the last one may be of fewer."""
    if size == 1:
        return count
    whole = count.shape[axis] // size * size
    head, tail = np.split(count, [whole], axis)
    shape = (*head.shape[:axis], whole // size, size, *head.shape[axis + 1 :])
    sums = [head.reshape(shape).sum(axis + 1, dtype=np.uint16)]
    return np.concatenate(sums + ([tail.sum(axis, keepdims=True, dtype=np.uint16)] if tail.shape[axis] else []), axis)

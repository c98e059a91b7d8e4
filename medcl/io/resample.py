"""Separable linear resampling between voxel grids that share their edges. numpy only, so workers start fast."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def resample_linear(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Resamples (X, Y, Z) to `shape`, float32; both grids cover the same extent, edge to edge.

    An axis that gets coarser by more than half is smoothed first, as a scanner with thicker slices would, so that fine
    texture does not alias.
    """
    array = np.asarray(array, dtype=np.float32)
    # the axis that shrinks most goes first: fewer voxels for the others
    for axis in sorted(range(3), key=lambda i: shape[i] / array.shape[i]):
        old, new = array.shape[axis], int(shape[axis])
        if old == new:
            continue
        factor = old / new
        if factor > 1.5:
            from scipy.ndimage import gaussian_filter1d

            array = gaussian_filter1d(array, sigma=0.35 * factor, axis=axis, mode="nearest")
        position = np.clip((np.arange(new) + 0.5) * factor - 0.5, 0, old - 1)
        below = np.minimum(np.floor(position).astype(np.intp), max(old - 2, 0))
        weight = (position - below).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(3)])
        low = np.take(array, below, axis)
        high = np.take(array, np.minimum(below + 1, old - 1), axis)
        array = low + weight * (high - low)
    return array


def resample_labels(labels: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Resamples an integer label map: each class's indicator linearly, then the largest; smooth on thick slices."""
    if tuple(labels.shape) == tuple(shape):
        return labels
    best = np.full(tuple(shape), -1.0, dtype=np.float32)
    out = np.zeros(tuple(shape), dtype=labels.dtype)
    for value in np.unique(labels):
        share = resample_linear(labels == value, shape)
        wins = share > best
        out[wins], best[wins] = value, share[wins]
    return out


def resampled_affine(affine: np.ndarray, old: Sequence[int], new: Sequence[int]) -> np.ndarray:
    """The affine of a grid of `new` voxels over the same extent as `old` voxels with `affine`."""
    factor = np.asarray(old, float) / np.asarray(new, float)
    out = np.array(affine, dtype=float)
    out[:3, :3] = affine[:3, :3] * factor
    out[:3, 3] = affine[:3, 3] + affine[:3, :3] @ ((factor - 1) / 2)
    return out

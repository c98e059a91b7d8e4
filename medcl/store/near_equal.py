"""Volumes of one grid and near-equal content under two subjects: one scan, normalised anew, stripped or saved again.

Equal voxels are found by their hash. Here thumbnails are compared cell by cell: no alignment, since the grid is equal.
What is left after taking away the local mean is correlated over the cells that show something in both, so that a skull
that was removed from one of the two does not count.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_erosion, gaussian_filter

SIGMA = 1.5  # cells, of the local mean
EDGE = 2  # cells beside the background that are left out: their local mean differs once the background was cut off
FLAT = 0.1  # share of the cells with one value that makes it the background
LEAST_CELLS = 500
LIKENESS = 0.85  # from which two volumes may be one; different hearts and hippocampi have up to 0.61
STEP = 0.25  # in Fisher's z, above the others; animals of one template differ by 0.1
OTHERS = 10  # most alike volumes of other subjects that a pair must stand out from: the middle one of them
PART = 5000  # volumes of a grid that are compared at once


@dataclass(frozen=True)
class NearEqual:
    """Two volumes of different subjects with near-equal content.

    Attributes:
        first, second: their places in the lists given, the lower first.
        likeness: correlation of their cells.
    """

    first: int
    second: int
    likeness: float


def near_equal(thumbnails: Sequence[np.ndarray], subjects: Sequence[str], grids: Sequence[Hashable]) -> list[NearEqual]:
    """Pairs of volumes of different subjects that lie on one grid and show nearly the same.

    A pair must be alike (correlation of 0.85), and stand out from how alike the other subjects on the grid are, so that
    registered brains and inbred animals are not taken for one scan. It takes about a second a thousand volumes of one
    grid squared. A grid that more than 5000 volumes share is looked at in parts of 5000.

    Args:
        thumbnails: uint8 (24, 24, 24) each, of `medcl.store.signature`.
        subjects: whose each volume is.
        grids: what only volumes of equal grid have in common, such as shape and affine.

    Returns:
        The pairs, the most alike first.
    """
    shared: dict[Hashable, list[int]] = {}
    for place, grid in enumerate(grids):
        shared.setdefault(grid, []).append(place)
    found = []
    for places in shared.values():
        for start in range(0, len(places), PART):
            part = places[start : start + PART]
            if len({subjects[place] for place in part}) > 1:
                found += _pairs([thumbnails[place] for place in part], [subjects[place] for place in part], part)
    return sorted(found, key=lambda pair: (-pair.likeness, pair.first, pair.second))


def _pairs(thumbnails: Sequence[np.ndarray], subjects: Sequence[str], places: Sequence[int]) -> list[NearEqual]:
    likeness = _correlations(*map(np.stack, zip(*map(_sharp, thumbnails), strict=True)))
    names = np.unique(subjects, return_inverse=True)[1]
    likeness[names[:, None] == names[None]] = -1.0  # a subject's own volumes are neither in question nor a measure
    found = []
    for one, other in zip(*np.nonzero(np.triu(likeness >= LIKENESS)), strict=True):
        usual = max(_usual(likeness[one], names, other), _usual(likeness[other], names, one))
        if np.arctanh(min(likeness[one, other], 0.9999)) - np.arctanh(usual) >= STEP:
            found.append(NearEqual(places[one], places[other], float(likeness[one, other])))
    return found


def _usual(row: np.ndarray, names: np.ndarray, but: int) -> float:
    """The likeness of a volume with other subjects than that of one volume, taken from the most alike of them."""
    others = np.sort(row[(names != names[but]) & (row > -1)])[::-1][:OTHERS]
    return float(np.clip(np.median(others), 0.0, 0.9999)) if len(others) else 0.0


def _sharp(thumbnail: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The picture less its local mean, float32 (13824,), and which cells lie well within what it shows."""
    picture = thumbnail.astype(np.float32)
    counts = np.bincount(thumbnail.ravel(), minlength=256)
    level = int(counts.argmax())
    shown = np.ones(thumbnail.shape, bool)
    if counts[level] >= FLAT * thumbnail.size:
        shown = np.abs(picture - level) > 2
    weight = shown.astype(np.float32)
    mean, share = (gaussian_filter(array, SIGMA, mode="nearest") for array in (picture * weight, weight))
    inside = binary_erosion(shown, iterations=EDGE, border_value=1)
    return ((picture - mean / np.maximum(share, 1e-3)) * inside).ravel(), inside.ravel().astype(np.float32)


def _correlations(sharp: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(n, n): correlation of each two rows over the cells that are inside in both; 0 where these are few."""
    cells = inside @ inside.T
    total, squares = sharp @ inside.T, (sharp * sharp) @ inside.T
    count = np.maximum(cells, 1)
    spread = np.maximum(squares - total * total / count, 1e-3)
    covariance = sharp @ sharp.T - total * total.T / count
    return np.where(cells >= LEAST_CELLS, covariance / np.sqrt(spread * spread.T), 0.0)

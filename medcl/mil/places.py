"""Where the instances of a bag lie: whole-numbered cells of a grid, from coordinates in pixels or voxels.

A slide's tiles come from several contours of tissue, each cut on a grid of its own: the smallest gap between two tiles'
coordinates says nothing. What the file says comes first, then what most neighbours in a line say, and then the distance
of nearest neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from medcl.mil.bags import Features

CLOSE = 0.25  # gaps that differ from their median by this share of it count as equal
OVERLAPPING = 0.9  # of a tile's side: a smaller step between neighbours is an overlap, not jitter


def cells_of(bag: Features) -> np.ndarray | None:
    """Cells (K, 2 or 3) of a bag's instances, from 0; None where nobody knows where they lie.

    Neighbours within one grid of tiles are one cell apart. Tiles of two grids may share a cell.
    """
    if bag.coordinates is None:
        return None
    if bag.cells is None:
        where = np.asarray(bag.coordinates, dtype=np.float64)
        bag.cells = on_grid(where, step_between(where, bag.meta or {}))
    return bag.cells


def on_grid(where: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Whole-numbered cells, the smallest 0 along every axis; a grid of that step is never torn by rounding.

    The borders of the cells lie where the fewest tiles begin: in the widest gap between the tiles' remainders.

    Args:
        where: (K, D) coordinates.
        step: (D,) of the grid, in the same units.
    """
    scaled = (where - where.min(0)) / step
    cells = np.empty(where.shape, dtype=np.int64)
    for axis, values in enumerate(scaled.T):
        rest = np.unique(values % 1.0)
        gaps = np.diff(rest, append=rest[0] + 1.0)
        border = rest[gaps.argmax()] + gaps.max() / 2
        cells[:, axis] = np.floor(values - border)
    return cells - cells.min(0)


def step_between(where: np.ndarray, meta: dict[str, Any]) -> np.ndarray:
    """Distance (D,) of neighbouring instances along every axis: as the file says it, or as they lie.

    Args:
        where: (K, D) coordinates.
        meta: of the feature file.
    """
    dims = where.shape[1]
    step, side = _stored(meta, "step", dims), side_of_tile(meta, dims)
    if step is not None:
        return step
    overlap = _stored(meta, "overlap", dims)
    if side is not None and overlap is not None:
        if (overlap < 1).all():  # a share of the tile, as medcl stores it
            return side * (1 - overlap)
        pixels = _stored(meta, "patch_size", dims)  # TRIDENT stores pixels of the tile
        if pixels is not None and (overlap < pixels).all():
            return side * (1 - overlap / pixels)
    found = step_in_lines(where)
    if side is not None:  # tiles may overlap without a word of it, but are not apart for being few
        return np.where(found < OVERLAPPING * side, found, side)
    return found if np.isfinite(found).all() else np.where(np.isfinite(found), found, step_to_nearest(where))


def side_of_tile(meta: dict[str, Any], dims: int) -> np.ndarray | None:
    """Side (D,) of an instance in the units of the coordinates, where the file says it: as medcl, TRIDENT and CLAM do.

    CLAM stores pixels of the level that a tile was read from, and coordinates of the finest level.
    """
    for name in ("patch_size_level0", "size") if dims == 3 else ("patch_size_level0",):
        side = _stored(meta, name, dims)
        if side is not None:
            return side
    pixels, factor = _stored(meta, "patch_size", dims), _stored(meta, "downsample", dims)
    if pixels is None or (factor is None and meta.get("patch_level", 0) != 0):
        return None
    return pixels if factor is None else pixels * factor


def _stored(meta: dict[str, Any], name: str, dims: int) -> np.ndarray | None:
    """An attribute as a number an axis; None where it is missing or makes no sense."""
    try:
        value = np.asarray(meta[name], dtype=np.float64).ravel()
    except (KeyError, TypeError, ValueError):
        return None
    least = 0.0 if name == "overlap" else np.finfo(float).tiny
    if len(value) not in (1, dims) or not (np.isfinite(value) & (value >= least)).all():
        return None
    return np.broadcast_to(value, dims).copy()


def step_in_lines(where: np.ndarray) -> np.ndarray:
    """Distance (D,) of neighbours that lie in one line along an axis; NaN where most of these distances disagree.

    Tiles of one line come from one grid, whatever other grids there are. Where no two lie in a line, the distances of
    neighbouring rows and columns stand in.
    """
    steps = np.full(where.shape[1], np.nan)
    for axis in range(where.shape[1]):
        others = np.delete(where, axis, axis=1)
        ordered = np.lexsort((where[:, axis], *others.T))
        gaps = np.diff(where[ordered, axis])
        gaps = gaps[(np.diff(others[ordered], axis=0) == 0).all(1) & (gaps > 0)]
        if not len(gaps):
            gaps = np.diff(np.unique(where[:, axis]))
        if len(gaps):
            alike = np.abs(gaps / np.median(gaps) - 1) <= CLOSE
            steps[axis] = gaps[alike].mean() if alike.mean() >= 0.5 else np.nan
    return steps


def step_to_nearest(where: np.ndarray) -> np.ndarray:
    """Distance (D,) of nearest neighbours, the same along axes that none lie along: for tiles that lie in no lines."""
    from scipy.spatial import cKDTree

    points = np.unique(where, axis=0)
    if len(points) < 2:
        return np.ones(where.shape[1])
    tree = cKDTree(points)
    usual = float(np.median(tree.query(points, k=2, p=np.inf)[0][:, 1]))
    pairs = tree.query_pairs(1.5 * usual, p=np.inf, output_type="ndarray")
    apart = np.abs(points[pairs[:, 0]] - points[pairs[:, 1]])
    steps = np.full(where.shape[1], usual)
    for axis in range(where.shape[1]):
        along = apart[:, axis]
        beside = np.delete(apart, axis, axis=1).max(1) < usual / 2
        if (beside & (along > usual / 2)).any():
            steps[axis] = along[beside & (along > usual / 2)].mean()
    return steps

"""Which thumbnails show the same volume, however flipped, permuted, resampled or cropped by a tenth at each face.

Two steps. The middle of every known picture, in all 48 orientations, is compared with many windows of a new one at 8
cells an axis: one matrix product. The few best are then aligned in earnest at 16 cells, by moving the window's six
faces, and the correlation that this reaches is the score. Both steps compare what is left after taking away the local
mean, because anatomy of one kind is alike in the large.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d

from medcl.store.signature import SIDE, along, through, window

THRESHOLD = 0.88  # docs/results/audit.md: copies score 0.909 and more, different people 0.853 and less
COARSE, FINE = 8, 16  # cells an axis
COARSE_SIGMA, FINE_SIGMA = 1.0, 1.5  # cells, of the local mean
MIDDLE = (10, 90)  # % of a known volume's axis that is looked for
# % of a new volume's axis where that may lie: nothing cropped, the new volume at both faces or one, the known one
WINDOWS = ((10, 90), (0, 100), (0, 90), (10, 100), (18, 82), (9, 81), (19, 91))
STEPS = (6, 3, 3, 2, 1, 1)  # % by which a face moves
BEST = 5  # known volumes that a new one is aligned with
HOPELESS = 0.7  # correlation below which nothing is aligned, or no further; copies have 0.85 before alignment
BLOCK = 128  # known volumes in one matrix product

ORIENTATIONS = tuple(
    (axes, flips) for axes in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)
)


@dataclass(frozen=True)
class Match:
    """A new volume that shows what a known one does.

    Attributes:
        known, new: their places in the lists compared.
        score: correlation of the aligned pictures.
    """

    known: int
    new: int
    score: float


def scores(
    known: Sequence[np.ndarray], new: Sequence[np.ndarray], left_out: Sequence[Collection[int]] = ()
) -> list[Match]:
    """The aligned correlation of every new volume with the few known ones that look most like it.

    Args:
        known: uint8 (24, 24, 24) each.
        new: of the volumes in question.
        left_out: for each new volume, places of known ones that it is not compared with; by default none. They take
            no place among the few.
    """
    found = []
    blocks = [(start, _middles(known[start : start + BLOCK])) for start in range(0, len(known), BLOCK)]
    for number, picture in enumerate(new):
        views = _views(picture)
        without = left_out[number] if left_out else ()
        near = [entry for start, block in blocks for entry in _nearest(views, block, start, without)]
        near.sort(key=lambda entry: -entry[0])
        aligned = [
            Match(index, number, _align(known[index], picture, orientation, _windows(view)))
            for _, index, orientation, view in near[:BEST]
        ]
        found += sorted(aligned, key=lambda match: -match.score)
    return found


def _middles(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """(n * 48, 512): the middle of each picture in each orientation."""
    rows = []
    for picture in pictures:
        middle = _unit(_sharp(picture, [MIDDLE] * 3, COARSE, COARSE_SIGMA)[None])[0].reshape((COARSE,) * 3)
        rows += [_oriented(middle, each).ravel() for each in range(len(ORIENTATIONS))]
    return np.stack(rows)


def _views(picture: np.ndarray) -> np.ndarray:
    """(343, 512): the picture through every combination of windows."""
    cubes = []
    for blurred in (False, True):
        matrix = np.stack([_cells(*each, COARSE, COARSE_SIGMA if blurred else 0.0) for each in WINDOWS])
        cube = picture.astype(np.float32)
        for _ in range(3):  # each pass turns one axis into (window, cell), and leaves these two last
            cube = np.tensordot(cube, matrix, (0, 2))
        order = (0, 2, 4, 1, 3, 5)
        cubes.append(cube.transpose(order).reshape(-1, COARSE**3))
    return _unit(cubes[0] - cubes[1])


def _nearest(
    views: np.ndarray, block: np.ndarray, start: int, without: Collection[int]
) -> list[tuple[float, int, int, int]]:
    """(coarse correlation, known volume, orientation, view) of the most similar volumes of a block."""
    correlation = views @ block.T
    best = correlation.max(0).reshape(-1, len(ORIENTATIONS))
    top = best.max(1)
    top[[place - start for place in without if 0 <= place - start < len(top)]] = -1.0
    entries = []
    for index in np.argsort(-top)[:BEST]:
        if top[index] < HOPELESS:
            break
        orientation = int(best[index].argmax())
        view = int(correlation[:, index * len(ORIENTATIONS) + orientation].argmax())
        entries.append((float(top[index]), start + int(index), orientation, view))
    return entries


def _align(known: np.ndarray, new: np.ndarray, orientation: int, windows: list[tuple[int, int]]) -> float:
    """Moves the faces of the window on the new picture until it shows the middle of the known one; the correlation."""
    target = _unit(_sharp(_oriented(known, orientation), [MIDDLE] * 3, FINE, FINE_SIGMA)[None])[0]
    picture, windows, best = new.astype(np.float32), list(windows), -1.0
    for number, step in enumerate(STEPS):
        if number == 2 and best < HOPELESS:
            return best
        for axis in range(3):
            tried = [
                (low, high)
                for low, high in itertools.product(*((end - step, end, end + step) for end in windows[axis]))
                if low >= -5 and high <= 105 and high - low >= 50
            ]
            cubes = []
            for sigma in (0.0, FINE_SIGMA):
                cube = picture
                for other in range(3):
                    if other != axis:
                        cube = along(_cells(*windows[other], FINE, sigma), cube, other)
                matrix = np.stack([_cells(*each, FINE, sigma) for each in tried])
                cubes.append(np.moveaxis(np.tensordot(matrix, cube, (2, axis)), 1, axis + 1))
            reached = _unit((cubes[0] - cubes[1]).reshape(len(tried), -1)) @ target
            best, windows[axis] = float(reached.max()), tried[int(reached.argmax())]
    return best


def _oriented(cube: np.ndarray, orientation: int) -> np.ndarray:
    axes, flips = ORIENTATIONS[orientation]
    return cube.transpose(axes)[tuple(slice(None, None, flip) for flip in flips)]


def _windows(view: int) -> list[tuple[int, int]]:
    n = len(WINDOWS)
    return [WINDOWS[view // (n * n)], WINDOWS[view // n % n], WINDOWS[view % n]]


@functools.lru_cache(maxsize=4096)
def _cells(low: int, high: int, cells: int, sigma: float) -> np.ndarray:
    """Matrix from a thumbnail's axis to cells of a window of it, given in %, and with `sigma` to their local mean."""
    matrix = window(SIDE, low / 100, high / 100, cells)
    return gaussian_filter1d(matrix, sigma, axis=0, mode="nearest") if sigma else matrix


def _sharp(picture: np.ndarray, windows: Sequence[tuple[int, int]], cells: int, sigma: float) -> np.ndarray:
    """A window of a picture less its local mean, flat."""
    array = picture.astype(np.float32)
    whole, mean = (through(array, [_cells(*each, cells, s) for each in windows]) for s in (0.0, sigma))
    return (whole - mean).ravel()


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of mean 0 and length 1, so that products are correlations; rows without contrast stay 0."""
    rows = rows - rows.mean(1, keepdims=True)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6), dtype=np.float32)

"""Polygons to pixels: the even-odd rule against scikit-image and against a loop, and structures that touch."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.draw import polygon2mask

from medcl.io.contours import enclosed

SHAPE = (17, 13)


def turns(polygon: np.ndarray, x: float, y: float) -> int:
    """How often a polygon winds around a point: the sum of the angles under which its edges are seen."""
    total = 0.0
    for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        ax, ay, bx, by = ax - x, ay - y, bx - x, by - y
        total += np.arctan2(ax * by - ay * bx, ax * bx + ay * by)
    return round(total / (2 * np.pi))


@pytest.mark.parametrize("seed", range(5))
def test_even_odd_equals_winding_numbers(seed):
    rng = np.random.default_rng(seed)
    polygons = [rng.uniform(-6, 22, (points, 2)) for points in (3, 5, 9)]  # they cross themselves and leave the image
    found = enclosed(polygons, SHAPE)
    for x, y in np.ndindex(SHAPE):
        assert found[x, y] == sum(turns(polygon, x, y) for polygon in polygons) % 2
    assert 0 < found.sum() < found.size


def test_even_odd_equals_scikit_image():
    rng = np.random.default_rng(9)
    shape = (60, 70)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 200))
    radii = rng.uniform(15, 28, 200)
    polygons = [np.stack([30 + k * radii * np.cos(angles), 34 + k * radii * np.sin(angles)], 1) for k in (1, 0.4, 1.3)]
    expected = np.logical_xor.reduce([polygon2mask(shape, polygon) for polygon in polygons])
    assert np.array_equal(enclosed(polygons, shape), expected)


def test_polygons_that_touch_on_pixel_centres_share_none_and_leave_none_out():
    """Every point lies on a pixel's centre: a fan of triangles covers the square once."""
    middle, ring = [8.0, 6.0], [[2, 1], [8, 1], [14, 1], [14, 6], [14, 11], [8, 11], [2, 11], [2, 6]]
    fan = [np.array([middle, a, b], float) for a, b in zip(ring, ring[1:] + ring[:1], strict=True)]
    times = sum(enclosed([triangle], SHAPE).astype(int) for triangle in fan)
    assert np.array_equal(times, enclosed([np.array(ring, float)], SHAPE)) and times.sum() == 12 * 10


def test_what_encloses_nothing():
    point, line = np.array([[3.0, 3.0]]), np.array([[1.0, 1.0], [9.0, 8.0]])
    assert not enclosed([], SHAPE).any() and not enclosed([point, line], SHAPE).any()
    assert enclosed([np.array([[-99, -99], [99, -99], [99, 99], [-99, 99]])], SHAPE).all()

"""Phantoms of one template: animals as alike as an inbred strain, for the audit of pictures."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from medcl.dataset.phantom import make_subject


def template(strain: int, shape: tuple[int, int, int] = (56, 48, 48)) -> np.ndarray:
    """The volume (X, Y, Z) that all animals of a strain resemble."""
    return np.asarray(make_subject((7, strain), shape=shape).image, np.float32)


def animal(
    strain: np.ndarray, number: int, amplitude: float = 0.6, smooth: float = 4.0, noise: float = 0.03
) -> np.ndarray:
    """One animal: the template, slightly deformed, with its own scale of intensities and its own noise.

    Args:
        strain: the template (X, Y, Z).
        number: of the animal.
        amplitude: root mean square of the displacement along an axis, in voxels.
        smooth: standard deviation of the Gaussian that smooths the displacement, in voxels.
        noise: standard deviation, as a share of the template's maximum.
    """
    rng = np.random.default_rng([3, number])
    grid = np.indices(strain.shape).astype(np.float64)
    for axis in range(3):
        field = gaussian_filter(rng.standard_normal(strain.shape), smooth)
        grid[axis] += amplitude * field / field.std()
    moved = map_coordinates(strain, grid, order=1, mode="nearest") * rng.uniform(0.5, 2)
    return np.clip(moved + rng.normal(0, noise * strain.max(), strain.shape), 0, None).astype(np.float32)

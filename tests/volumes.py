"""What tests of reading share: an image of known numbers, and reading what must be refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medcl.errors import MedclError
from medcl.io.volumes import read_volume


def rng_array(shape: tuple[int, ...] = (5, 6, 7), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-500, 500, shape).astype(np.int16)


def fails(match: str, *paths: Path, channel: int | None = None) -> MedclError:
    with pytest.raises(MedclError, match=match) as caught:
        read_volume(paths, channel)
    assert "\n" not in str(caught.value)
    return caught.value


def rotation(degrees: float) -> np.ndarray:
    """An oblique rotation: about z, then about x."""
    a, b = np.radians(degrees), np.radians(degrees / 2)
    z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return x @ z


def world(affine: np.ndarray, index: tuple[int, ...]) -> np.ndarray:
    return (affine @ [*index, 1])[:3]


def peak(array: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(array.argmax(), array.shape))

"""Values between voxels: the fast form of a CPU against scipy and against torch's own sampling of volumes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from medcl.transforms.sampling import _MOST_ROWS, sample


def places(shape: tuple[int, ...], seed: int = 0, beyond: float = 0.3) -> torch.Tensor:
    """Places in and around a volume of `shape`, (2, 3, 5, 6, 7)."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor(shape, dtype=torch.float32).reshape(3, 1, 1, 1)
    where = torch.rand(2, 3, 5, 6, 7, generator=generator)
    return (where * (1 + 2 * beyond) - beyond) * (size - 1)


@pytest.mark.parametrize("shape", [(9, 8, 7), (1, 8, 7), (9, 1, 7), (9, 8, 1), (40, 50, 30), (128, 128, 20)])
def test_linear_is_scipys(shape: tuple[int, ...]) -> None:
    image, where = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1)), places(shape)
    found = sample(image, where)
    for b in range(2):
        for c in range(3):
            expected = ndimage.map_coordinates(image[b, c].numpy(), where[b].numpy(), order=1, mode="nearest")
            # the place within a row keeps 1/1000 voxel, beside neighbours that differ by up to 6
            np.testing.assert_allclose(found[b, c].numpy(), expected, atol=6e-3)


@pytest.mark.parametrize("shape", [(9, 8, 7), (128, 130, 4)])
@pytest.mark.parametrize(("mode", "padding"), [("bilinear", "border"), ("bilinear", "zeros"), ("nearest", "zeros")])
def test_every_form_is_grid_samples(shape: tuple[int, ...], mode: str, padding: str) -> None:
    assert 9 * 8 < _MOST_ROWS < 128 * 130, "both ways of sampling belong to this test"
    image, where = torch.randn(2, 2, *shape, dtype=torch.float64), places(shape).double()
    size = torch.tensor(shape, dtype=torch.float64).reshape(3, 1, 1, 1)
    grid = ((2 * where + 1) / size - 1).flip(1).permute(0, 2, 3, 4, 1)
    expected = F.grid_sample(image, grid, mode, padding, align_corners=False)
    torch.testing.assert_close(sample(image, where, mode, padding), expected)  # type: ignore[arg-type]
    single = sample(image.float(), where.float(), mode, padding)  # type: ignore[arg-type]
    torch.testing.assert_close(single, expected.float(), rtol=0, atol=2e-4)


def test_voxels_come_back_where_they_are_asked_for() -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 1, 6, 5, 4)
    where = torch.from_numpy(np.indices((6, 5, 4))).float()[None]
    torch.testing.assert_close(sample(image, where), image, rtol=0, atol=5e-5)  # float32's weights
    ramp = where[:, :1] * 100 + where[:, 1:2] * 10 + where[:, 2:]
    half = where.clamp(max=torch.tensor([5.0, 4.0, 3.0]).reshape(3, 1, 1, 1) - 0.5) + 0.25
    expected = (half * torch.tensor([100.0, 10.0, 1.0]).reshape(3, 1, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(sample(ramp, half), expected, rtol=0, atol=1e-2)


def test_a_row_does_not_see_the_next_slice() -> None:
    image = torch.zeros(1, 1, 4, 4, 4)
    image[:, :, 2] = 1e6  # at the last row of slice 1, the first of slice 2 is next in memory
    where = torch.tensor([1.0, 3.0, 2.0]).reshape(1, 3, 1, 1, 1)
    assert sample(image, where).item() == 0

"""Values of a volume between its voxels: `grid_sample` in voxel coordinates, and a faster form of it on a CPU."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_ROWS = 1 << 14  # the number of a row takes bits from the place within it; beyond, 1/1000 voxel would be lost


def sample(
    image: Tensor,
    where: Tensor,
    mode: Literal["bilinear", "nearest"] = "bilinear",
    padding: Literal["border", "zeros"] = "border",
) -> Tensor:
    """Values at any places, interpolated linearly along each axis or taken from the nearest voxel.

    On a CPU, linear interpolation of float32 keeps weights to about 1/1000 voxel.

    Args:
        image: (B, C, D, H, W) float.
        where: (B, 3, D', H', W') voxel coordinates along D, H, W; 0 is the centre of the first voxel.
        mode: of interpolation, by `grid_sample`'s names.
        padding: what lies outside: the nearest voxel, or 0.

    Returns:
        (B, C, D', H', W') in the type of `image`.
    """
    usual = (mode, padding, image.device.type, image.dtype) == ("bilinear", "border", "cpu", torch.float32)
    if usual and image.shape[2] * image.shape[3] <= _MOST_ROWS:
        return _linear_by_rows(image, where)
    axes = [_normalised(where[:, axis], image.shape[2 + axis]) for axis in (2, 1, 0)]
    return F.grid_sample(image, torch.stack(axes, dim=-1).to(image.dtype), mode, padding, align_corners=False)


def _normalised(place: Tensor, size: int) -> Tensor:
    """Coordinates of `grid_sample`: the edges of the first and last voxel at -1 and 1."""
    return place.mul(2 / size).add_(1 / size - 1)


def _linear_by_rows(image: Tensor, where: Tensor) -> Tensor:
    """Linear interpolation as two samples of one plane.

    Torch's `grid_sample` of planes is vectorised on a CPU, that of volumes is not. The slices one below the other are
    such a plane: a sample at row `z height + y` interpolates within slice z, as long as y stays within the slice. What
    is left is the way from slice z to the next, which is another channel of the same sample.
    """
    batch, channels, depth, height, width = image.shape
    z = where[:, 0].clamp(0, depth - 1)
    below = z.floor()
    between = z.sub_(below)[:, None]
    rows = torch.add(where[:, 1].clamp(0, height - 1), below, alpha=height)
    grid = torch.stack([_normalised(where[:, 2], width), _normalised(rows, depth * height)])
    pair = image.new_empty(batch, 2, channels, depth, height, width)
    pair[:, 0] = image
    pair[:, 1, :, :-1] = image[:, :, 1:]
    pair[:, 1, :, -1] = image[:, :, -1]
    plane = pair.reshape(batch, 2 * channels, depth * height, width)
    found = F.grid_sample(plane, grid.permute(1, 2, 3, 4, 0).flatten(1, 2), "bilinear", "border", align_corners=False)
    upper, lower = found.reshape(batch, 2, channels, *where.shape[2:]).unbind(1)
    return upper.lerp(lower, between)

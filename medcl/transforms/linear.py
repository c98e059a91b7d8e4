"""Linear maps along the axes of a volume.

Blurring, loss of resolution and smooth fields are all one thing: a small matrix per axis. As matrix products they are
many times faster on a CPU than convolutions, and one batch may hold a different matrix for every sample.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

NEGLIGIBLE = 1e-12  # beside the largest weight, which is 1: far below float32's precision


def along_axes(x: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Multiplies every line of voxels along each axis by that axis's matrix.

    Args:
        x: (B, C, D, H, W).
        matrices: for D, H and W a matrix (out, in) for all samples, (B, out, in) for each, or None to leave the axis.

    Returns:
        (B, C, D', H', W').
    """
    depth, height, width = matrices
    batch, channels = x.shape[:2]
    # always the axis's own memory layout: no transposition of the volume is ever made
    if width is not None:
        x = torch.matmul(x.flatten(1, 3), width.mT).reshape(*x.shape[:4], width.shape[-2])
    if height is not None:
        matrix = height if height.dim() == 2 else height.repeat_interleave(channels * x.shape[2], dim=0)
        x = torch.matmul(matrix, x.flatten(0, 2)).reshape(batch, channels, x.shape[2], matrix.shape[-2], x.shape[4])
    if depth is not None:
        matrix = depth if depth.dim() == 2 else depth[:, None]
        x = torch.matmul(matrix, x.flatten(3)).reshape(batch, channels, matrix.shape[-2], *x.shape[3:])
    return x


def gaussian_matrix(size: int, sigma: Tensor) -> Tensor:
    """Gaussian smoothing with weights renormalised at the border, so that a constant stays itself.

    Args:
        size: voxels along the axis.
        sigma: (B,) in voxels; 0 gives the identity.

    Returns:
        (B, size, size), rows summing to 1.
    """
    index = torch.arange(size, dtype=torch.float32, device=sigma.device)
    distance = (index[:, None] - index[None, :]) / sigma.clamp(min=1e-3)[:, None, None]
    weight = torch.exp(-0.5 * distance.square())
    # far weights are denormal numbers, by which a CPU multiplies twenty times more slowly
    weight = torch.where(weight < NEGLIGIBLE, 0.0, weight)
    return weight / weight.sum(dim=2, keepdim=True)


def low_resolution_matrix(size: int, zoom: Tensor) -> Tensor:
    """Averages `size` voxels into about `zoom * size` thicker ones and interpolates them linearly back.

    Args:
        size: voxels along the axis.
        zoom: (B,) in (0, 1]; 1 gives the identity.

    Returns:
        (B, size, size), rows summing to 1.
    """
    count = torch.round(size * zoom).clamp(1, size)[:, None]  # (B, 1)
    thickness = size / count
    index = torch.arange(size, dtype=torch.float32, device=zoom.device)
    # down: how much of fine voxel j lies within thick voxel k; rows beyond `count` come out empty and stay unused
    start = index[None, :] * thickness
    low = torch.maximum(start[:, :, None], index)
    high = torch.minimum((start + thickness)[:, :, None], index + 1)
    down = (high - low).clamp(min=0) / thickness[:, :, None]
    # up: linear weights of the thick voxels' centres at the fine voxel's centre, the first and last held
    centre = ((index[None, :] + 0.5) / thickness - 0.5).clamp(min=0)
    centre = torch.minimum(centre, count - 1)
    up = (1 - (centre[:, :, None] - index).abs()).clamp(min=0)
    return up @ down


@functools.lru_cache(maxsize=64)
def bspline_matrix(size: int, knots: int) -> Tensor:
    """Uniform cubic B-splines: from `knots` control values to `size` voxels, smooth and within the values' range.

    The outer control points lie beyond the ends, so that the curve is as free there as elsewhere.

    Args:
        size: voxels along the axis.
        knots: control values, at least 4.

    Returns:
        (size, knots), non-negative, rows summing to 1. Shared between calls: not to be written to.
    """
    position = torch.linspace(0, knots - 3, size) if size > 1 else torch.full((1,), (knots - 3) / 2)
    distance = (position[:, None] - (torch.arange(knots) - 1)[None, :]).abs()
    inner = 2 / 3 - distance.square() + distance**3 / 2
    outer = (2 - distance).clamp(min=0) ** 3 / 6
    return torch.where(distance < 1, inner, outer)


def smooth_field(control: Tensor, shape: Sequence[int]) -> Tensor:
    """Cubic B-spline field over a volume.

    Args:
        control: (B, C, k, l, m) control values, at least 4 along each axis.
        shape: (D, H, W).

    Returns:
        (B, C, D, H, W).
    """
    counts = control.shape[2:]
    return along_axes(control, [bspline_matrix(n, k).to(control.device) for n, k in zip(shape, counts, strict=True)])

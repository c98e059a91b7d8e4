"""Sizes of views, and fitting them to a network."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from medcl.store.plan import Plan, round_up

Triple = tuple[int, int, int]
FEWEST_FEATURES = 4  # voxels of the coarsest map: instance norm and pooling need some to speak of


def network_input(crop: Triple, multiple: Triple, fewest: int = FEWEST_FEATURES) -> Triple:
    """The size crops are enlarged to: multiples of the network's total stride with a few voxels left at its bottom."""
    size = round_up(crop, multiple)
    able = [n > 1 for n in size] if max(size) > 1 else [True] * 3  # a single slice stays one
    while math.prod(n // m for n, m in zip(size, multiple, strict=True)) < fewest:
        least = min(n for n, ok in zip(size, able, strict=True) if ok)
        a, b, c = (n * 2 if n == least and ok else n for n, ok in zip(size, able, strict=True))
        size = (a, b, c)
    return size


def enlarged(images: Tensor, size: Triple) -> Tensor:
    """Images (N, C, D, H, W) resampled to `size`, or as they are where that is theirs."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="trilinear", align_corners=False)


def view_size(plan: Plan, partitions: Triple = (1, 1, 1)) -> Triple:
    """Voxels of a view: the fine-tuning patch as far as the median volume fills it, or the part of it in a partition.

    Args:
        plan: of the volumes.
        partitions: along each axis.
    """
    wish = [min(p, v) for p, v in zip(plan.patch_size, plan.volume_size, strict=True)]
    parts = [v // g if g > 1 else w for v, w, g in zip(plan.volume_size, wish, partitions, strict=True)]
    x, y, z = (
        # to the nearest multiple of what the network can halve: rounding up would fill a small view with padding
        max(1, math.ceil(n / m - 0.5)) * m for n, m in zip(parts, plan.total_stride, strict=True)
    )  # fmt: skip
    return x, y, z

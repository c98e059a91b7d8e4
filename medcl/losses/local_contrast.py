"""Contrast of the regions of a decoder map: the same place in two views against places nearby.

Chaitanya et al., NeurIPS 2020, section 3.2. The release holds tables of nearby regions for two map sizes; here regions
and their neighbours are generated for any map.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from medcl.losses.contrastive import contrast

STRATEGIES = ("LR", "LD")


def region_corners(size: Sequence[int], region: int, along: int) -> tuple[Tensor, tuple[int, ...]]:
    """Regions spread evenly over a map, the outermost touching its border.

    Args:
        size: voxels of the map.
        region: voxels of a region along each axis; a shorter axis is spanned whole.
        along: regions along each axis, as far as there are different places for them.

    Returns:
        First voxels (R, 3), the last axis fastest, and the voxels of a region along each axis.
    """
    extent = tuple(min(region, n) for n in size)
    places = []
    for n, k in zip(size, extent, strict=True):
        count = min(along, n - k + 1)
        places.append([(n - k) // 2] if count == 1 else [round(i * (n - k) / (count - 1)) for i in range(count)])
    return torch.tensor(list(itertools.product(*places))), extent


def nearest_disjoint(corners: Tensor, extent: Sequence[int], spacing: Sequence[float], count: int) -> Tensor:
    """Which regions are negatives of which: the `count` nearest, in mm, that share no voxel with it.

    Args:
        corners: first voxels (R, 3).
        extent: voxels of a region along each axis.
        spacing: mm of a voxel of the map along each axis.
        count: negatives of every region, as far as there are so many.

    Returns:
        (R, R) bool; row u holds the negatives of region u.
    """
    between = (corners[:, None] - corners).abs()
    apart = (between >= torch.tensor(extent)).any(-1)
    distance = (between * torch.tensor(spacing)).norm(dim=-1).masked_fill(~apart, torch.inf)
    order = distance.argsort(dim=1, stable=True)[:, :count]
    chosen = torch.zeros_like(apart).scatter_(1, order, True)
    return chosen & apart


def local_masks(
    strategy: str, near: Tensor, valid: Tensor, volume: Tensor, partition: Tensor, inside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Positive and negative pairs among the regions of N reads in two views: (2 N R, 2 N R) bool each.

    LR: a region and the same place in the other view of its read are positive, the regions near it, in both views of
    the read, negative. LD: what other volumes show at the same region of the same partition is positive too.

    Args:
        strategy: one of `STRATEGIES`.
        near: `nearest_disjoint`, (R, R).
        valid: whether the second view shows the place of a region, (N, R).
        volume: a read's volume, (N,).
        partition: a read's partition, (N,).
        inside: whether the place of a region holds data, (N, R) bool: else it takes no part in either view. By default
            all do.

    Rows are ordered by read, view and region, the region fastest.
    """
    n, r = valid.shape
    device = valid.device
    read = torch.arange(n, device=device).repeat_interleave(2 * r)
    view = torch.arange(2, device=device).repeat_interleave(r).repeat(n)
    region = torch.arange(r, device=device).repeat(2 * n)
    inside = torch.ones_like(valid) if inside is None else inside
    seen = torch.stack([inside, valid & inside], dim=1).flatten()
    usable = seen[:, None] & seen
    same_read, same_region = read[:, None] == read, region[:, None] == region
    positive = same_read & same_region & (view[:, None] != view)
    if strategy == "LD":
        owner, part = volume[read], partition[read]
        positive |= same_region & (part[:, None] == part) & (owner[:, None] != owner)
    negative = same_read & near.to(device)[region][:, region]
    return positive & usable, negative & usable


def local_loss(
    strategy: str, z: Tensor, near: Tensor, valid: Tensor, volume: Tensor, partition: Tensor, temperature: float,
    inside: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Contrast over regions (N, 2, R, d); see `local_masks`. LR works read by read, which needs no large matrix."""
    if strategy == "LD":
        rows = z.flatten(0, 2)
        return contrast(rows, rows, *local_masks(strategy, near, valid, volume, partition, inside), temperature)
    inside = torch.ones_like(valid) if inside is None else inside
    one = torch.zeros(1, dtype=torch.long, device=z.device)
    masks = [local_masks(strategy, near, v[None], one, one, i[None]) for v, i in zip(valid, inside, strict=True)]
    positive, negative = (torch.stack(each) for each in zip(*masks, strict=True))
    rows = z.flatten(1, 2)
    return contrast(rows, rows, positive, negative, temperature)

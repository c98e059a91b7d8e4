"""Random block masks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medcl.transforms.random import uniform


def block_mask(seeds: Tensor, shape: Sequence[int], block: Sequence[int], ratio: float, name: str = "mask") -> Tensor:
    """Hides the same number of blocks in every sample, at random.

    Args:
        seeds: (N,) int64; a sample's mask is a function of its own seed.
        shape: voxels of the volume.
        block: voxels of a block; the last one along an axis may be cut off.
        ratio: share of the blocks that is hidden; at least one is, and at least one is not.
        name: other names give other masks of the same seeds.

    Returns:
        (N, 1, *shape) bool, True where hidden.

    Raises:
        ValueError: there is a single block.
    """
    grid = [math.ceil(n / b) for n, b in zip(shape, block, strict=True)]
    count = math.prod(grid)
    if count < 2:
        raise ValueError(f"blocks of {tuple(block)} voxels leave a single one in {tuple(shape)}")
    hidden = min(max(round(ratio * count), 1), count - 1)
    order = uniform(seeds, name, count).argsort(dim=1, stable=True)
    mask = torch.zeros(len(seeds), count, dtype=torch.bool).scatter_(1, order[:, :hidden], True).view(-1, 1, *grid)
    for axis, size in enumerate(block):
        mask = mask.repeat_interleave(size, dim=axis + 2)
    return mask[:, :, : shape[0], : shape[1], : shape[2]]

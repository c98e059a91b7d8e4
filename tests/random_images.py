"""Batches of random images and labels, and a smooth blob."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SHAPE = (14, 12, 10)
SEEDS = torch.tensor([3, 1, 4, 159, 2**62, 6])


def volumes(batch: int = len(SEEDS), shape: tuple[int, ...] = SHAPE, channels: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, channels, *shape, generator=generator)
    return image, torch.randint(0, 4, (batch, 1, *shape), generator=generator, dtype=torch.uint8)


def smooth_blob(shape: tuple[int, ...], centre: tuple[float, ...], width: float = 2.5) -> Tensor:
    index = np.indices(shape).reshape(3, -1).T - np.array(centre)
    return torch.from_numpy(np.exp(-0.5 * (index**2).sum(1) / width**2).reshape(1, 1, *shape)).float()

"""Mixup and CutMix of volumes: parameters are functions of the samples' seeds, and apply to images and labels alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.special import betaincinv
from torch import Tensor

from medcl.transforms.random import as_seeds, bernoulli, uniform

MIXES = ("none", "mixup", "cutmix")
ALPHA = {"mixup": 0.4, "cutmix": 1.0}
PROBABILITY = 0.5


def draw_shares(seeds: Tensor, kind: str, shape: Sequence[int], probability: float = PROBABILITY) -> Tensor:
    """How much of every voxel comes from the partner.

    Mixup (Zhang et al., ICLR 2018): the same share everywhere, drawn from Beta(a, a) and at most a half, so that the
    sample stays the larger part. CutMix (Yun et al., ICCV 2019): 1 inside a box, 0 outside; the box has the volume's
    proportions, lies anywhere inside it, and spans a share of it drawn from Beta(a, a).
    a is 0.4 for mixup and 1 for CutMix.

    Args:
        seeds: (B,) int64.
        kind: `mixup` or `cutmix`.
        shape: (D, H, W).
        probability: of mixing a sample.

    Returns:
        (B, 1, D, H, W), or (B, 1, 1, 1, 1) for mixup; zeros for samples that are not mixed.
    """
    seeds = as_seeds(seeds)
    a = ALPHA[kind]
    share = torch.from_numpy(betaincinv(a, a, uniform(seeds, f"{kind}.share").double().numpy())).float()
    share = share * bernoulli(seeds, f"{kind}.mixed", probability)
    if kind == "mixup":
        return torch.minimum(share, 1 - share).view(-1, 1, 1, 1, 1)
    place = uniform(seeds, "cutmix.place", 3)
    inside = torch.ones(len(seeds), 1, 1, 1)
    for axis, n in enumerate(shape):
        side = torch.round(share ** (1 / 3) * n)
        start = torch.floor(place[:, axis] * (n - side + 1))
        voxel = torch.arange(n)
        along = (voxel >= start[:, None]) & (voxel < (start + side)[:, None])
        inside = inside * along.view(len(seeds), *(n if i == axis else 1 for i in range(3)))
    return inside[:, None]


def partners(labelled: int, unlabelled: int) -> Tensor:
    """The partner of every row of a batch, labelled rows first.

    Where there are both, labelled and unlabelled rows are each other's partners, in both directions (Bai et al.,
    "Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation", CVPR 2023); else the next row is.
    """
    one, other = torch.arange(labelled), torch.arange(unlabelled)
    if labelled and unlabelled:
        return torch.cat([labelled + one % unlabelled, other % labelled])
    return one.roll(-1) if labelled else other.roll(-1)


def mixed(rows: Tensor, share: Tensor, partner: Tensor) -> Tensor:
    """rows + share * (their partners - rows), for images, shares of classes and weights of voxels alike; exact at 1."""
    share = share.to(rows.device, rows.dtype)
    return rows * (1 - share) + rows[partner.to(rows.device)] * share

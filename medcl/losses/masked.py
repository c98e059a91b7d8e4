"""Masked reconstruction: blocks of a volume are hidden, and only what was hidden is scored.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, section 3. A block is a box of voxels; blocks
are numbered with the last axis fastest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Triple = tuple[int, int, int]
EPS = 1e-6  # added to the variance of a block before its root: a block of one grey value stays finite


def hidden_blocks(scores: Tensor, count: int) -> Tensor:
    """The `count` blocks with the lowest scores, for every sample equally many: (B, N) to ascending (B, count)."""
    return scores.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values


def to_blocks(volume: Tensor, block: Triple) -> Tensor:
    """Cuts (B, C, D, H, W) into blocks (B, N, C * voxels of a block); every axis must be a multiple of the block's."""
    b, c, *size = volume.shape
    (p, q, r), (i, j, k) = (n // s for n, s in zip(size, block, strict=True)), block
    pieces = volume.reshape(b, c, p, i, q, j, r, k).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return pieces.reshape(b, p * q * r, c * i * j * k)


def chosen_blocks(volume: Tensor, block: Triple, which: Tensor) -> Tensor:
    """The blocks numbered `which` (B, K) of (B, C, D, H, W): (B, K, C * voxels of a block)."""
    blocks = to_blocks(volume, block)
    return blocks.gather(1, which[..., None].expand(-1, -1, blocks.shape[-1]))


def hidden_voxels(which: Tensor, block: Triple, size: Triple) -> Tensor:
    """Which voxels the blocks numbered `which` (B, K) cover: (B, 1, *size) bool."""
    (p, q, r) = (n // s for n, s in zip(size, block, strict=True))
    covered = torch.zeros(len(which), p * q * r, dtype=torch.bool, device=which.device).scatter_(1, which, True)
    volume = covered.view(-1, 1, p, q, r)
    for axis, n in enumerate(block):
        volume = volume.repeat_interleave(n, dim=axis + 2)
    return volume


def block_normalised(target: Tensor, inside: Tensor) -> Tensor:
    """Every block (B, K, V) at mean 0 and standard deviation 1 of its own voxels `inside` (B, K, V), 0 elsewhere.

    He et al. 2022, section 3, "Reconstruction target": (x - mean) / sqrt(variance + 1e-6).
    """
    weight = inside.to(target.dtype)
    count = weight.sum(-1, keepdim=True).clamp(min=1)
    centred = (target - (target * weight).sum(-1, keepdim=True) / count) * weight
    return centred * torch.rsqrt(centred.square().sum(-1, keepdim=True) / count + EPS)


def reconstruction_loss(
    prediction: Tensor, target: Tensor, inside: Tensor, kind: str = "mse", normalise: str = "none"
) -> Tensor:
    """Mean over samples of a sample's mean error over its hidden voxels, in float32.

    Args:
        prediction: of the hidden blocks (B, K, V).
        target: their voxels (B, K, V).
        inside: which of them belong to the volume (B, K, V) bool; the others, padding, are not scored.
        kind: `mse` for (p - t)^2, `l1` for |p - t|.
        normalise: `none`, or `block` for targets of mean 0 and standard deviation 1 in every block.

    Returns:
        A scalar. A sample of padding alone counts as 0.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target = prediction.float(), target.float()
        if normalise == "block":
            target = block_normalised(target, inside)
        error = (prediction - target).square() if kind == "mse" else (prediction - target).abs()
        error, weight = (error * inside).flatten(1), inside.flatten(1)
        return (error.sum(1) / weight.sum(1).clamp(min=1)).mean()


def level_of(image: Tensor, seen: Tensor, kind: str = "mse") -> Tensor:
    """The best single grey value (B,) for the voxels `seen` of (B, ...): their mean, for `l1` their median.

    0 where nothing is seen.
    """
    rows = [row[known] if known.any() else row.new_zeros(1) for row, known in zip(image, seen, strict=True)]
    return torch.stack([row.median() if kind == "l1" else row.mean() for row in rows])


def interpolated(image: Tensor, seen: Tensor) -> Tensor:
    """Fills unseen voxels from their surroundings: what continuing the visible edges would predict.

    Shell by shell, an unknown voxel that touches known ones takes the mean of those among its 26 neighbours.

    Args:
        image: (B, 1, D, H, W).
        seen: which voxels are known (B, 1, D, H, W) bool; where none is, the result is 0.
    """
    known = seen.to(image.dtype)
    filled = image * known
    for _ in range(sum(image.shape[2:])):  # no voxel is further from a known one
        if bool(known.all()):
            break
        share = F.avg_pool3d(known, 3, stride=1, padding=1)
        around = F.avg_pool3d(filled, 3, stride=1, padding=1) / share.clamp(min=EPS)
        filled = torch.where(known > 0, filled, torch.where(share > 0, around, 0.0))
        known = (share > 0).to(image.dtype)
    return filled

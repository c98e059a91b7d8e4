"""Segmentation losses against shares of classes, weighted by voxel: labels, mixed labels and pseudo-labels alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medcl.networks.ranks import sum_over_ranks, world_size

SMOOTH = 1e-5  # in numerator and denominator of the Dice, as in MONAI


def shares(label: Tensor, classes: int) -> Tensor:
    """A label map (B, 1, D, H, W) of channel numbers as shares of classes (B, K, D, H, W), 0 or 1, float32."""
    out = torch.zeros(len(label), classes, *label.shape[2:], device=label.device)
    return out.scatter_(1, label.long(), 1.0)


def mean_over_ranks(count: Tensor) -> Tensor:
    """What a rank's sum is divided by, so that the mean over ranks is the joined sum over the joined count."""
    return sum_over_ranks(count) / world_size()


def dice_ce(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, inside: Tensor | None = None
) -> Tensor:
    """Soft Dice loss over the foreground classes plus cross-entropy.

    The Dice of a class is taken over the whole batch, that of all ranks: single patches often lack small structures.
    With 0 and 1 for shares and without weights this is MONAI's `DiceCELoss(include_background=False, softmax=True,
    batch=True)`. The mean over ranks, of loss and gradient, is that of one process with the joined batch.

    Args:
        logits: (B, K, D, H, W).
        target: share of every class in a voxel, (B, K, D, H, W), background first; they sum to 1.
        weight: of every voxel, (B, 1, D, H, W). A voxel of weight 0 counts in neither part. The cross-entropy is the
            weighted sum over the number of all voxels, so that few trusted voxels teach little (as in FixMatch, Sohn
            et al., NeurIPS 2020, equation 4).
        inside: which voxels hold data, (B, 1, D, H, W), 0 or 1: their number is what the weighted sum is divided by.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_p = torch.log_softmax(logits.float(), dim=1)
        entropy = -(target * log_p).sum(1, keepdim=True)
        p, t = log_p[:, 1:].exp(), target[:, 1:]
        overlap, total = p * t, p + t
        if weight is not None:
            entropy, overlap, total = entropy * weight, overlap * weight, total * weight
        space = (0, 2, 3, 4)
        overlap, total = sum_over_ranks(torch.stack([overlap.sum(space), total.sum(space)]))
        dice = (2 * overlap + SMOOTH) / (total + SMOOTH)
        count = entropy.new_tensor(float(entropy.numel())) if inside is None else inside.sum()
        return (1 - dice).mean() + entropy.sum() / mean_over_ranks(count).clamp(min=1 / world_size())


def consistency(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean over voxels and classes of the squared difference between the student's and the teacher's probabilities.

    Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017, section 3.

    Args:
        logits: of the student, (B, K, D, H, W).
        target: probabilities of the teacher, (B, K, D, H, W), without gradient.
        weight: of every voxel, (B, 1, D, H, W); the mean is over voxels of weight above 0, of all ranks.
    """
    with torch.autocast(logits.device.type, enabled=False):
        apart = (torch.softmax(logits.float(), dim=1) - target).square().mean(1, keepdim=True)
        return (apart * weight).sum() / mean_over_ranks(weight.sum()).clamp(min=1 / world_size())


def ramp_up(progress: float, length: float) -> float:
    """exp(-5 (1 - t)^2) with t rising from 0 to 1 over the first `length` of the steps (Laine and Aila, ICLR 2017)."""
    if progress >= length:
        return 1.0
    return math.exp(-5 * (1 - max(progress, 0.0) / length) ** 2)

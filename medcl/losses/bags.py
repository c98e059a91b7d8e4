"""Losses over bag embeddings: supervised contrast, with its weight moving to the classifier during training.

Juyal et al., "SC-MIL: Supervised Contrastive Multiple Instance Learning for Imbalanced Classification in Pathology",
WACV 2024. The paper has no public code; the shape of the schedule is a setting here, not a reproduction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medcl.losses.contrastive import cosine

SCHEDULES = ("linear", "parabolic", "cosine")


def supervised_contrast(
    z: Tensor, labels: Tensor, temperature: float, memory: Tensor | None = None, memory_labels: Tensor | None = None,
    left_out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sum over anchors of -1/|P(i)| sum_{p in P(i)} log( e^{z_i.z_p / t} / sum_{a != i} e^{z_i.z_a / t} ), as a mean.

    Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2.

    Args:
        z: embeddings of bags (B, d); need not be normalised.
        labels: (B,).
        temperature: positive.
        memory: embeddings of earlier bags (n, d), compared with but without gradient.
        memory_labels: (n,).
        left_out: (B, B + n) bool, what an anchor is not compared with beside itself, such as its own earlier embedding.

    Returns:
        Mean over the anchors that have a positive; 0 where none has.

    Raises:
        ValueError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    others, other_labels = z, labels
    if memory is not None and memory_labels is not None and len(memory):
        others, other_labels = torch.cat([z, memory.detach().to(z.dtype)]), torch.cat([labels, memory_labels])
    itself = torch.eye(len(z), len(others), dtype=torch.bool, device=z.device)
    if left_out is not None:
        itself = itself | left_out
    s = (cosine(z, others) / temperature).masked_fill(itself, -torch.inf)
    log_share = s - torch.logsumexp(s, dim=1, keepdim=True)
    positive = (labels[:, None] == other_labels[None, :]) & ~itself
    count = positive.sum(1)
    terms = torch.where(positive, -log_share, 0.0).sum(1) / count.clamp(min=1)
    return terms.sum() / (count > 0).sum().clamp(min=1)


def contrast_weight(progress: float, schedule: str = "parabolic") -> float:
    """Share of the contrastive loss after a share of the training: from 1 at the start to 0 at the end."""
    t = min(max(progress, 0.0), 1.0)
    return {"linear": 1 - t, "parabolic": 1 - t * t, "cosine": 0.5 * (1 + math.cos(math.pi * t))}[schedule]

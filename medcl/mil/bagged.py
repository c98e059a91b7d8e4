"""What every multiple-instance aggregator shares: its interface, what it gives back, and a softmax over instances."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Bagged:
    """What an aggregator makes of a batch of bags.

    Attributes:
        logits: (B, C).
        attention: how much each instance counts, (B, K), 0 at padding; rows sum to 1.
        embedding: (B, E), what the classifier is given.
        extra: further tensors that the aggregator's own loss needs.
    """

    logits: Tensor
    attention: Tensor
    embedding: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)


class Aggregator(nn.Module, ABC):
    """Maps bags to class logits.

    Args:
        features: width M of an instance.
        classes: number C of bag classes, at least 2.
    """

    def __init__(self, features: int, classes: int = 2):
        super().__init__()
        self.features, self.classes = features, classes

    @abstractmethod
    def forward(self, h: Tensor, mask: Tensor, coordinates: Tensor | None = None) -> Bagged:
        """Logits of bags.

        Args:
            h: instances (B, K, M).
            mask: (B, K) bool, True at instances, False at padding; every bag has at least one instance.
            coordinates: (B, K, 2 or 3) whole numbers, the instance's cell in the slide or volume; None if unknown.
        """

    def loss(self, bagged: Bagged, labels: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
        """Cross-entropy of the bags (B,), with class weights (C,)."""
        return F.cross_entropy(bagged.logits.float(), labels, weight)

    def probabilities(self, bagged: Bagged) -> Tensor:
        """(B, C), rows sum to 1."""
        return bagged.logits.float().softmax(1)


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax along the last dimension in float32, exactly 0 where the mask is False."""
    return scores.float().masked_fill(~mask, -torch.inf).softmax(-1)

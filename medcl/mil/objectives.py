"""What a classifier of bags is trained by: the aggregator's own loss, or SC-MIL's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from medcl.config.mil import MILFitConfig
from medcl.losses.bags import contrast_weight, supervised_contrast
from medcl.mil.classifier import BagClassifier


@dataclass
class Batch:
    """Bags of a step.

    Attributes:
        h: (B, K, M), not standardised.
        mask: (B, K) bool.
        where: cells (B, K, 2 or 3), or None.
        labels: (B,).
        bags: numbers of the bags among all that are trained on.
        rows: numbers of their instances, an array a bag.
        progress: share of the training that is done.
    """

    h: Tensor
    mask: Tensor
    where: Tensor | None
    labels: Tensor
    bags: Sequence[int]
    rows: Sequence[np.ndarray]
    progress: float


class Plain:
    """The aggregator's own loss, with class weights.

    Attributes:
        divisible: whether the loss of a batch is a mean over parts of it, which may then be computed one by one.
    """

    divisible = True

    def __init__(self, model: BagClassifier, config: MILFitConfig, sizes: Sequence[int], labels: Tensor):
        """Prepares the objective.

        Args:
            model: what is trained, on its device; what the objective adds to it is trained too.
            config: of the stage.
            sizes: instances of every bag.
            labels: of all bags.
        """
        self.model, self.config = model, config
        share = torch.bincount(labels, minlength=model.aggregator.classes).float()
        weight = len(labels) / (len(share) * share.clamp(min=1))
        self.weight = weight if config.balance == "weights" else None

    def loss(self, batch: Batch) -> Tensor:
        """Scalar loss of a batch of bags; the aggregator's own, with class weights where `balance` is `weights`."""
        out = self.model(batch.h, batch.mask, batch.where)
        return self.model.aggregator.loss(out, batch.labels, batch.mask, self.weight)

    def share(self, part: Tensor, whole: Tensor) -> float:
        """What the labels of a part of a batch count in the mean over the whole.

        Every aggregator's loss is a mean over bags, sum(w l) / sum(w) with the weights w of their labels.
        """
        if self.weight is None:
            return len(part) / len(whole)
        return float(self.weight[part].sum() / self.weight[whole].sum())

    def after_step(self) -> None:
        """Called after every step of the optimiser."""


class BagContrast(Plain):
    """SC-MIL: supervised contrast over bags and a memory of earlier ones, its weight falling to 0 during training.

    A bag is not compared with itself, whether it stands in the memory or was drawn twice for a batch.
    """

    divisible = False

    def __init__(self, model: BagClassifier, config: MILFitConfig, sizes: Sequence[int], labels: Tensor):
        super().__init__(model, config, sizes, labels)
        device = model.mean.device
        with torch.no_grad():
            example = torch.zeros(1, 1, model.aggregator.features, device=device)
            one = torch.ones(1, 1, dtype=torch.bool, device=device)
            width = model.eval()(example, one).embedding.shape[1]
        model.projection = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 128)).to(device)
        self.memory: list[tuple[Tensor, Tensor, Tensor]] = []  # embeddings, labels and numbers of earlier bags

    def loss(self, batch: Batch) -> Tensor:
        assert self.model.projection is not None
        out = self.model(batch.h, batch.mask, batch.where)
        plain = self.model.aggregator.loss(out, batch.labels, batch.mask, self.weight)
        z = self.model.projection(out.embedding)
        numbers = torch.as_tensor(batch.bags, device=z.device)
        now = (z.detach(), batch.labels, numbers)
        memory, memory_labels, earlier = (torch.cat([part[:0], *(each[i] for each in self.memory)])
                                          for i, part in enumerate(now))  # fmt: skip
        itself = numbers[:, None] == torch.cat([numbers, earlier])
        contrast = supervised_contrast(z, batch.labels, self.config.temperature, memory, memory_labels, itself)
        self.memory.append(now)
        while sum(len(parts[1]) for parts in self.memory) > self.config.memory and self.memory:
            self.memory.pop(0)
        share = contrast_weight(batch.progress, self.config.schedule)
        return share * contrast + (1 - share) * plain

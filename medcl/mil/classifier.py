"""A classifier of bags: standardised features, then an aggregator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medcl.config import nearest
from medcl.config.mil import MILFitConfig
from medcl.errors import MedclError
from medcl.mil.aggregators import AGGREGATORS
from medcl.mil.bagged import Aggregator, Bagged
from medcl.mil.bags import Features
from medcl.mil.ins import INS
from medcl.mil.places import cells_of

STATISTICS_FROM = 200_000  # instances that mean and deviation are taken from


@dataclass(frozen=True)
class Prediction:
    """What a model says of one bag: `probabilities` (C,), and `attention` (K,), which sums to 1.

    `instances` are the class probabilities of the instances (K, C), where the model classifies them too.
    """

    probabilities: np.ndarray
    attention: np.ndarray
    instances: np.ndarray | None = None


class BagClassifier(nn.Module):
    """Standardisation of the features by the training bags, then an aggregator; for SC-MIL a projection besides."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, aggregator: Aggregator, width: int = 128):
        super().__init__()
        self.aggregator = aggregator
        self.register_buffer("mean", torch.zeros(aggregator.features))
        self.register_buffer("deviation", torch.ones(aggregator.features))
        self._width = width
        self.projection: nn.Module | None = None

    def standardise(self, bags: Sequence[Features]) -> None:
        """Takes mean and standard deviation of every feature over instances of these bags."""
        total = sum(len(bag.h) for bag in bags)
        every = max(1, total // STATISTICS_FROM)
        rows = torch.from_numpy(np.concatenate([bag.h[::every] for bag in bags]))
        mean = rows.mean(0)
        # two passes: exact enough, and faster than var_mean along rows
        deviation = (rows - mean).square_().mean(0).sqrt()
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 1e-8, deviation, 1.0))

    def standardised(self, h: Tensor) -> Tensor:
        """Features (B, K, M) as the aggregator sees them; one pass over memory."""
        return torch.addcmul(-self.mean / self.deviation, h, 1 / self.deviation)

    def forward(self, h: Tensor, mask: Tensor, coordinates: Tensor | None = None) -> Bagged:
        return self.aggregator(self.standardised(h), mask, coordinates)


def build(config: MILFitConfig, features: int, classes: int) -> BagClassifier:
    """The classifier that a config asks for.

    Raises:
        MedclError: no such aggregator, or an option it does not have.
    """
    if config.method != "ins" and config.aggregator not in AGGREGATORS:
        raise MedclError(
            f"unknown aggregator {config.aggregator!r}", "--aggregator", nearest(config.aggregator, AGGREGATORS)
        )
    made: Any
    name, made = ("ins", INS) if config.method == "ins" else (config.aggregator, AGGREGATORS[config.aggregator])
    try:
        return BagClassifier(made(features, classes, **config.options))
    except TypeError as error:
        raise MedclError(f"{name}: {error}", "--options", "Leave that option out.") from None


def collate(bags: Sequence[Features], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor | None]:
    """Bags of unequal size as (B, K, M), a mask (B, K) and cells (B, K, 2 or 3), or None where one bag has none."""
    if len(bags) == 1 and bags[0].h.flags.writeable:  # nothing to pad, so nothing to copy
        only, at = bags[0], cells_of(bags[0])
        everywhere = torch.ones(1, len(only.h), dtype=torch.bool)
        place = None if at is None else torch.from_numpy(at)[None].to(device)
        return torch.from_numpy(only.h)[None].float().to(device), everywhere.to(device), place
    longest = max(len(bag.h) for bag in bags)
    h = torch.zeros(len(bags), longest, bags[0].h.shape[1])
    mask = torch.zeros(len(bags), longest, dtype=torch.bool)
    cells = [cells_of(bag) for bag in bags]
    known = all(c is not None for c in cells)
    where = torch.zeros(len(bags), longest, cells[0].shape[1], dtype=torch.long) if known else None  # type: ignore[union-attr]
    for row, bag in enumerate(bags):
        count = len(bag.h)
        h.numpy()[row, :count] = bag.h  # through numpy, for torch warns of arrays that cannot be written
        mask[row, :count] = True
        if where is not None:
            where[row, :count] = torch.from_numpy(cells[row])
    return h.to(device), mask.to(device), None if where is None else where.to(device)


@torch.no_grad()
def predict(model: BagClassifier, bags: Sequence[Features]) -> list[Prediction]:
    """Probabilities and attention, bag by bag."""
    device = model.mean.device
    model.eval()
    found = []
    for bag in bags:
        out = model(*collate([bag], device))
        probabilities = model.aggregator.probabilities(out)[0].double().cpu().numpy()
        instances = out.extra["instance"][0].softmax(1).cpu().numpy() if "instance" in out.extra else None
        attention = out.attention[0].float().cpu().numpy()
        found.append(Prediction(probabilities / probabilities.sum(), attention, instances))
    return found

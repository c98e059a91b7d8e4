"""Training and applying a classifier of bags."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from medcl.config import nearest
from medcl.config_mil import MILFitConfig
from medcl.data.bags import Features
from medcl.errors import MedclError
from medcl.losses.bags import contrast_weight, supervised_contrast
from medcl.networks.aggregators import AGGREGATORS, Aggregator, Bagged
from medcl.training import warmup_cosine

WARMUP = 0.05
STATISTICS_FROM = 200_000  # instances that mean and deviation are taken from


@dataclass(frozen=True)
class Prediction:
    """What a model says of one bag: `probabilities` (C,) and `attention` (K,), which sums to 1."""

    probabilities: np.ndarray
    attention: np.ndarray


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
        rows = np.concatenate([bag.h[::every] for bag in bags]).astype(np.float64)
        deviation = rows.std(0)
        self.mean.copy_(torch.from_numpy(rows.mean(0)))
        self.deviation.copy_(torch.from_numpy(np.where(deviation > 1e-8, deviation, 1.0)))

    def forward(self, h: Tensor, mask: Tensor, coordinates: Tensor | None = None) -> Bagged:
        return self.aggregator((h - self.mean) / self.deviation, mask, coordinates)


def build(config: MILFitConfig, features: int, classes: int) -> BagClassifier:
    """The classifier that a config asks for.

    Raises:
        MedclError: no such aggregator, or an option it does not have.
    """
    if config.aggregator not in AGGREGATORS:
        raise MedclError(
            f"unknown aggregator {config.aggregator!r}", "--aggregator", nearest(config.aggregator, AGGREGATORS)
        )
    try:
        return BagClassifier(AGGREGATORS[config.aggregator](features, classes, **config.options))
    except TypeError as error:
        raise MedclError(f"{config.aggregator}: {error}", "--options", "Leave that option out.") from None


def collate(bags: Sequence[Features], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor | None]:
    """Bags of unequal size as (B, K, M), a mask (B, K) and cells (B, K, 2 or 3), or None where one bag has none."""
    longest = max(len(bag.h) for bag in bags)
    h = torch.zeros(len(bags), longest, bags[0].h.shape[1])
    mask = torch.zeros(len(bags), longest, dtype=torch.bool)
    cells = [cells_of(bag) for bag in bags]
    known = all(c is not None for c in cells)
    where = torch.zeros(len(bags), longest, cells[0].shape[1], dtype=torch.long) if known else None  # type: ignore[union-attr]
    for row, bag in enumerate(bags):
        count = len(bag.h)
        h[row, :count] = torch.from_numpy(bag.h)
        mask[row, :count] = True
        if where is not None:
            where[row, :count] = torch.from_numpy(cells[row])
    return h.to(device), mask.to(device), None if where is None else where.to(device)


def cells_of(bag: Features) -> np.ndarray | None:
    """Whole-numbered cells of a grid from coordinates in pixels: divided by the smallest step between instances."""
    if bag.coordinates is None:
        return None
    columns = []
    for values in np.asarray(bag.coordinates, dtype=np.int64).T:
        steps = np.diff(np.unique(values))
        columns.append((values - values.min()) // (steps.min() if len(steps) else 1))
    return np.stack(columns, axis=1)


def train(
    config: MILFitConfig, bags: Sequence[Features], labels: Sequence[int], classes: int, seed: int, device: str = "cpu"
) -> BagClassifier:
    """Fits a classifier to bags with labels in 0 .. classes-1."""
    torch.manual_seed(seed)
    model = build(config, bags[0].h.shape[1], classes)
    model.standardise(bags)
    if config.method == "sc":
        example = collate(bags[:1])
        with torch.no_grad():
            width = model.eval()(*example).embedding.shape[1]
        model.projection = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 128))
    model.to(device).train()
    target = torch.as_tensor(labels, device=device)
    share = torch.bincount(target, minlength=classes).float()
    weight = len(labels) / (classes * share.clamp(min=1)) if config.balance == "weights" else None
    optimiser = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    rng = np.random.default_rng([seed, 7])
    steps = config.epochs * -(-len(bags) // config.batch_size)
    memory: list[tuple[Tensor, Tensor]] = []
    for step, chosen in enumerate(batches(config, labels, rng)):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * warmup_cosine(step, steps, WARMUP)
        h, mask, where = collate([subsample(bags[i], config.most_instances, rng) for i in chosen], device)
        wanted = target[torch.as_tensor(chosen, device=device)]
        out = model(h, mask, where)
        loss = model.aggregator.loss(out, wanted, mask, weight)
        if model.projection is not None:
            z = model.projection(out.embedding)
            earlier = [torch.cat(parts) for parts in zip(*memory, strict=True)] if memory else [None, None]
            contrast = supervised_contrast(z, wanted, config.temperature, earlier[0], earlier[1])
            share_now = contrast_weight(step / steps, config.schedule)
            loss = share_now * contrast + (1 - share_now) * loss
            memory.append((z.detach(), wanted))
            while sum(len(parts[1]) for parts in memory) > config.memory and memory:
                memory.pop(0)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
    return model.eval()


def batches(config: MILFitConfig, labels: Sequence[int], rng: np.random.Generator) -> Iterator[list[int]]:
    """Batches of bag numbers: every bag once an epoch, or every class equally often with balanced sampling."""
    numbers = np.arange(len(labels))
    balanced = config.balance == "sampling"
    share = np.bincount(labels)[np.asarray(labels)].astype(float)
    for _ in range(config.epochs):
        if balanced:
            order = rng.choice(numbers, len(numbers), p=(1 / share) / (1 / share).sum())
        else:
            order = rng.permutation(numbers)
        for begin in range(0, len(order), config.batch_size):
            yield order[begin : begin + config.batch_size].tolist()


def subsample(bag: Features, most: int, rng: np.random.Generator) -> Features:
    """At most so many of a bag's instances, at random; 0 keeps all."""
    if not most or len(bag.h) <= most:
        return bag
    chosen = np.sort(rng.choice(len(bag.h), most, replace=False))
    return Features(bag.h[chosen], None if bag.coordinates is None else bag.coordinates[chosen], bag.encoder, bag.meta)


@torch.no_grad()
def predict(model: BagClassifier, bags: Sequence[Features]) -> list[Prediction]:
    """Probabilities and attention, bag by bag."""
    device = model.mean.device
    model.eval()
    found = []
    for bag in bags:
        out = model(*collate([bag], device))
        probabilities = model.aggregator.probabilities(out)[0].double().cpu().numpy()
        found.append(Prediction(probabilities / probabilities.sum(), out.attention[0].float().cpu().numpy()))
    return found

"""Training and applying a classifier of bags."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medcl.config import nearest
from medcl.config_mil import MILFitConfig
from medcl.data.bags import Features
from medcl.data.places import cells_of
from medcl.downstream.ins import INS, InstanceContrast
from medcl.downstream.objectives import BagContrast, Batch, Plain
from medcl.errors import MedclError
from medcl.networks.aggregators import AGGREGATORS
from medcl.networks.bagged import Aggregator, Bagged
from medcl.optimizer import decayed, warmup_cosine

WARMUP = 0.05
STATISTICS_FROM = 200_000  # instances that mean and deviation are taken from
OVERHEAD = 1000  # padded instances that cost about as much as another pass through the network
METHODS: dict[str, type[Plain]] = {"plain": Plain, "sc": BagContrast, "ins": InstanceContrast}


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


def train(
    config: MILFitConfig, bags: Sequence[Features], labels: Sequence[int], classes: int, seed: int, device: str = "cpu"
) -> BagClassifier:
    """Fits a classifier to bags with labels in 0 .. classes-1."""
    torch.manual_seed(seed)
    model = build(config, bags[0].h.shape[1], classes)
    model.standardise(bags)
    model.to(device)
    target = torch.as_tensor(labels, device=device)
    objective = METHODS[config.method](model, config, [len(bag.h) for bag in bags], target)
    model.train()
    groups = [
        {"params": [p for p in model.parameters() if decayed(p) == decay], "weight_decay": config.weight_decay * decay}
        for decay in (True, False)
    ]
    optimiser = torch.optim.AdamW(groups, config.lr)
    rng = np.random.default_rng([seed, 7])
    steps = config.epochs * -(-len(bags) // config.batch_size)
    for step, chosen in enumerate(batches(config, labels, rng)):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * warmup_cosine(step, steps, WARMUP)
        drawn = [rows_of(bags[i], config.most_instances, rng) for i in chosen]
        parts = like_sized([len(rows) for rows in drawn]) if objective.divisible else [list(range(len(chosen)))]
        optimiser.zero_grad()
        for part in parts:
            some = [chosen[i] for i in part]
            h, mask, where = collate([some_of(bags[chosen[i]], drawn[i]) for i in part], device)
            batch = Batch(h, mask, where, target[some], some, [drawn[i] for i in part], step / steps)
            (objective.loss(batch) * objective.share(target[some], target[chosen])).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        objective.after_step()
    return model.eval()


def like_sized(sizes: Sequence[int]) -> list[list[int]]:
    """Divides bags so that padding each part to its longest costs least: one large bag must not pad all others.

    Args:
        sizes: instances of every bag.

    Returns:
        Parts of the bags' numbers, each at least one, in ascending order within a part.
    """
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
    best: list[tuple[int, list[int]]] = [(0, [])]  # cost and cuts of the first n bags
    for end in range(1, len(order) + 1):
        longest = sizes[order[end - 1]]
        costs = [(best[begin][0] + (end - begin) * longest + OVERHEAD, begin) for begin in range(end)]
        cost, begin = min(costs)
        best.append((cost, [*best[begin][1], begin]))
    cuts = [*best[-1][1], len(order)]
    return [sorted(order[a:b]) for a, b in itertools.pairwise(cuts)]


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


def rows_of(bag: Features, most: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of at most so many of a bag's instances, at random, ascending; 0 takes all."""
    if not most or len(bag.h) <= most:
        return np.arange(len(bag.h))
    return np.sort(rng.choice(len(bag.h), most, replace=False))


def some_of(bag: Features, rows: np.ndarray) -> Features:
    """A bag of some of its instances, each in the cell that it has in the whole bag."""
    if len(rows) == len(bag.h):
        return bag
    where, cells = bag.coordinates, cells_of(bag)
    if where is None or cells is None:
        return Features(bag.h[rows], None, bag.encoder, bag.meta)
    return Features(bag.h[rows], where[rows], bag.encoder, bag.meta, cells[rows])


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

"""Training a classifier of bags."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from medcl.config.mil import MILFitConfig
from medcl.mil.bags import Features
from medcl.mil.classifier import BagClassifier, build, collate
from medcl.mil.ins_objective import InstanceContrast
from medcl.mil.objectives import BagContrast, Batch, Plain
from medcl.mil.places import cells_of
from medcl.runtime.optimizer import decayed, warmup_cosine

WARMUP = 0.05
OVERHEAD = 1000  # padded instances that cost about as much as another pass through the network
METHODS: dict[str, type[Plain]] = {"plain": Plain, "sc": BagContrast, "ins": InstanceContrast}


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
            h, mask, where = collate([subset_of(bags[chosen[i]], drawn[i]) for i in part], device)
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


def subset_of(bag: Features, rows: np.ndarray) -> Features:
    """A bag of some of its instances, each in the cell that it has in the whole bag."""
    if len(rows) == len(bag.h):
        return bag
    where, cells = bag.coordinates, cells_of(bag)
    if where is None or cells is None:
        return Features(bag.h[rows], None, bag.encoder, bag.meta)
    return Features(bag.h[rows], where[rows], bag.encoder, bag.meta, cells[rows])

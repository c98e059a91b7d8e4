"""Bags: medcl's training against a plain PyTorch loop of gated attention, from 1,000 to 100,000 instances a bag.

    python benchmarks/mil_bags.py [--instances 1000 10000 100000] [--features 512]

One bag a step, both 128 wide. The other side is a loop as a user would write it: without the standardisation, dropout,
clipping of gradients and learning-rate schedule that `medcl mil fit` comes with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sidebyside import alone, begin, peak_mb, rounds_of, tell
from torch import nn

from medcl.config.mil import MILFitConfig
from medcl.mil.bags import Features
from medcl.mil.training import train

MEDCL, PLAIN, BAGS = "medcl", "plain PyTorch", 4


class GatedAttention(nn.Module):
    """Ilse et al., ICML 2018."""

    def __init__(self, features: int, hidden: int = 128):
        super().__init__()
        self.first, self.tanh = nn.Linear(features, hidden), nn.Linear(hidden, hidden)
        self.gate, self.score, self.last = nn.Linear(hidden, hidden), nn.Linear(hidden, 1), nn.Linear(hidden, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        weight = torch.softmax(self.score(torch.tanh(self.tanh(h)) * torch.sigmoid(self.gate(h))), 0)
        return self.last((weight * h).sum(0))


def plain(bags: list[np.ndarray], epochs: int) -> None:
    torch.manual_seed(0)
    network = GatedAttention(bags[0].shape[1])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    for _ in range(epochs):
        for number, bag in enumerate(bags):
            optimizer.zero_grad()
            logits = network(torch.from_numpy(bag))
            nn.functional.cross_entropy(logits[None], torch.tensor([number % 2])).backward()
            optimizer.step()


def ours(bags: list[np.ndarray], epochs: int) -> None:
    more = {"options": {"hidden": 128}, "batch_size": 1, "balance": "none"}
    config = MILFitConfig("", "", aggregator="gated_abmil", epochs=epochs, **more)
    train(config, [Features(bag) for bag in bags], [number % 2 for number in range(len(bags))], 2, seed=0)


def make(instances: int, features: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((instances, features), dtype=np.float32) for _ in range(BAGS)]


def memory(arm: str, instances: int, features: int) -> float:
    """MB at the height beyond the bags."""
    bags = make(instances, features)
    run: Any = ours if arm == MEDCL else plain
    run([bag[:10] for bag in bags], 1)
    before = peak_mb()
    run(bags, 1)
    return peak_mb() - before


def main() -> None:
    args = begin(
        __doc__,
        ("--instances", {"type": int, "nargs": "+", "default": [1000, 10_000, 100_000]}),
        ("--features", {"type": int, "default": 512}),
    )
    for instances in args.instances:
        bags, epochs = make(instances, args.features), max(1, 20_000 // instances)
        arms = {PLAIN: lambda b=bags, e=epochs: plain(b, e), MEDCL: lambda b=bags, e=epochs: ours(b, e)}
        spent = rounds_of(arms, args.rounds, clock=args.clock)
        tell(f"bags of {instances} x {args.features}", spent, BAGS * epochs, "bags/s", MEDCL)
        held = {name: alone(memory, name, instances, args.features) for name in arms}
        print("  memory beyond the bags: " + ", ".join(f"{name} {mb:.0f} MB" for name, mb in held.items()), flush=True)


if __name__ == "__main__":
    main()

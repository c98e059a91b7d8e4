"""Fitting time against torchmil's ABMIL, on the same bags, of the same widths, in turn in one run.

    pip install --no-deps torchmil tensordict pyvers cloudpickle orjson importlib_metadata zipp
    python benchmarks/mil_torchmil.py [--rounds 5]

Gated attention of 128 on an embedding of 256; equal epochs, batch size and number of threads; AdamW for both. torchmil
trains by its own `Trainer`, `collate_fn` and padding. Its trainer validates after every epoch, in training mode and
with gradients: it is given a single bag of one instance for that, so that its time is next to that of training alone.
Ours is `medcl.mil.training.train`, standardisation and all.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time

import numpy as np
import torch
from torch import nn

from medcl.config.mil import MILFitConfig
from medcl.mil.bags import Features
from medcl.mil.training import train

SETS = {  # bags, least and most instances, features, epochs
    "musk-like": (92, 2, 40, 166, 20),
    "unequal": (92, 2, 1000, 166, 5),
    "slides": (24, 300, 1500, 1024, 2),
}
BATCH = 8


def bags_of(count: int, least: int, most: int, features: int) -> tuple[list[Features], list[int]]:
    """Sizes are spread evenly in the logarithm, as those of people's bags are."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(np.log(least), np.log(most), count)).round().astype(int)
    return [Features(rng.standard_normal((n, features), dtype=np.float32)) for n in sizes], [
        i % 2 for i in range(count)
    ]


def ours(bags: list[Features], labels: list[int], epochs: int) -> float:
    began = time.perf_counter()
    train(MILFitConfig("", "", epochs=epochs, batch_size=BATCH, balance="none"), bags, labels, 2, seed=0)
    return time.perf_counter() - began


def theirs(bags: list[Features], labels: list[int], epochs: int) -> float:
    from torch.utils.data import DataLoader
    from torchmil.data import collate_fn
    from torchmil.models import ABMIL
    from torchmil.utils import Trainer

    width = bags[0].h.shape[1]
    data = [{"X": torch.from_numpy(b.h), "Y": torch.tensor(float(y))} for b, y in zip(bags, labels, strict=True)]
    tiny = [{"X": data[0]["X"][:1], "Y": data[0]["Y"]}]
    began = time.perf_counter()
    torch.manual_seed(0)
    model = ABMIL((width,), 128, gated=True, feat_ext=nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Dropout(0.25)))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01)
    trainer = Trainer(model, optimiser, device="cpu", verbose=False, disable_pbar=True)
    loaders = [DataLoader(some, BATCH, shuffle=True, collate_fn=collate_fn) for some in (data, tiny)]
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(epochs, *loaders)
    return time.perf_counter() - began


def main(rounds: int) -> None:
    for name, (*shape, epochs) in SETS.items():
        bags, labels = bags_of(*shape)
        ours(bags, labels, 1), theirs(bags, labels, 1)  # what is done once only is not timed
        pairs = [(ours(bags, labels, epochs), theirs(bags, labels, epochs)) for _ in range(rounds)]
        medcl, torchmil = (statistics.median(each) for each in zip(*pairs, strict=True))
        print(f"{name}: {len(bags)} bags of {min(len(b.h) for b in bags)} to {max(len(b.h) for b in bags)} instances, "
              f"{shape[-1]} features, {epochs} epochs, {torch.get_num_threads()} threads: medcl {medcl:.2f} s, "
              f"torchmil {torchmil:.2f} s, ratio {medcl / torchmil:.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args().rounds)

"""INS against attention: which instances are positive, from the labels of bags alone.

    python benchmarks/mil_instances.py --out runs/instances [--seeds 5] [--methods abmil gated_abmil ins]

Two sets whose instances' labels are known, to score with and never to train with. `planted`: bags of 20 to 40 Gaussian
instances of 20 features; one to four of a positive bag are shifted by 1.5 in five of them, and so overlap with the
others. `digits`: bags of 10 to 30 digits of 8 x 8 pixels (scikit-learn's), positive where one to three of them are a
nine; test bags are made of other pictures than training bags.

Instance AUROC `pooled` is over all instances of all test bags, `within` the mean over positive bags of the AUROC
inside. For attention the pooled score is attention times the bag's probability, as attention sums to 1 in every bag.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from medcl.config.mil import MILFitConfig
from medcl.mil.bags import Features
from medcl.mil.classification import rank_auroc
from medcl.mil.classifier import predict
from medcl.mil.training import train
from medcl.runtime.files import write_rows

TRAIN, TEST = 100, 100
Bags = tuple[list[Features], list[int], list[np.ndarray]]


def planted(count: int, rng: np.random.Generator) -> Bags:
    bags, labels, marks = [], [], []
    for number in range(count):
        h = rng.normal(size=(int(rng.integers(20, 41)), 20)).astype(np.float32)
        mark = np.zeros(len(h), dtype=bool)
        if number % 2:
            mark[: rng.integers(1, 5)] = True
            h[mark, :5] += 1.5
        bags.append(Features(h))
        labels.append(number % 2)
        marks.append(mark)
    return bags, labels, marks


def digits(count: int, rng: np.random.Generator, part: int) -> Bags:
    from sklearn.datasets import load_digits

    pixels, names = load_digits(return_X_y=True)
    mine = np.random.default_rng(0).permutation(len(pixels)) % 2 == part
    nines, others = np.flatnonzero(mine & (names == 9)), np.flatnonzero(mine & (names != 9))
    bags, labels, marks = [], [], []
    for number in range(count):
        size = int(rng.integers(10, 31))
        has = int(rng.integers(1, 4)) if number % 2 else 0
        chosen = np.concatenate([rng.choice(nines, has), rng.choice(others, size - has)])
        bags.append(Features(pixels[chosen].astype(np.float32)))
        labels.append(number % 2)
        marks.append(np.arange(size) < has)
    return bags, labels, marks


def scores(method: str, learn: Bags, held: Bags, seed: int, epochs: int) -> dict[str, float]:
    own = {"method": "ins"} if method == "ins" else {"aggregator": method}
    model = train(MILFitConfig("", "", epochs=epochs, **own), learn[0], learn[1], 2, seed)
    told = predict(model, held[0])
    bag = np.array([each.probabilities[1] for each in told])
    inside = [each.attention * p if each.instances is None else each.instances[:, 1]
              for each, p in zip(told, bag, strict=True)]  # fmt: skip
    positive = [i for i, label in enumerate(held[1]) if label]
    return {
        "bag": rank_auroc(bag, np.array(held[1]) > 0),
        "pooled": rank_auroc(np.concatenate(inside), np.concatenate(held[2])),
        "within": float(np.mean([rank_auroc(inside[i], held[2][i]) for i in positive])),
    }


def main(out: Path, seeds: int, first: int, methods: list[str], epochs: int) -> None:
    lines = []
    for name in ("planted", "digits"):
        for method in methods:
            each, began = [], time.monotonic()
            for seed in range(first, first + seeds):
                rng = np.random.default_rng([seed, 5])
                learn, held = ((planted(n, rng) if name == "planted" else digits(n, rng, part))
                               for part, n in enumerate((TRAIN, TEST)))  # fmt: skip
                each.append(scores(method, learn, held, seed, epochs))
            told = {key: [s[key] for s in each] for key in each[0]}
            lines.append({
                "set": name, "method": method,
                **{key: f"{np.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for key, v in told.items()},
                "seconds": round((time.monotonic() - began) / seeds, 1),
            })  # fmt: skip
            print(lines[-1], flush=True)
            write_rows(out / "table.csv", lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/instances"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--methods", nargs="+", default=["abmil", "gated_abmil", "dsmil", "ins"])
    arguments = parser.parse_args()
    main(arguments.out, arguments.seeds, arguments.first, arguments.methods, arguments.epochs)

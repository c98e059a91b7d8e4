"""SC-MIL against plain cross-entropy where one class is rare: 1:1, 1:5 and 1:10.

    python benchmarks/mil_imbalance.py --out runs/imbalance [--seeds 5] [--sets digits] [--ratios 10]

Bags of `mil_instances.py`: 132 to train on, of which the positive ones are a half, a sixth or an eleventh, and 100 to
test on, half of them positive. Four ways of training gated attention: cross-entropy as it is, with class weights, with
balanced sampling of bags, and SC-MIL, which samples in balance too. Setting and number of epochs are the defaults.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from mil_instances import Bags, digits, planted

from medcl.config.mil import MILFitConfig
from medcl.mil.classification import classification_scores
from medcl.mil.classifier import predict
from medcl.mil.training import train
from medcl.runtime.files import write_rows

TRAIN, TEST = 132, 100
WAYS = {
    "cross-entropy": {"balance": "none"},
    "class weights": {"balance": "weights"},
    "balanced sampling": {"balance": "sampling"},
    "SC-MIL": {"balance": "sampling", "method": "sc"},
}


def imbalanced(bags: Bags, ratio: int) -> Bags:
    """Of bags in turn negative and positive, TRAIN with one positive to `ratio` negative ones."""
    positive = TRAIN // (ratio + 1)
    kept = [i for label, n in ((0, TRAIN - positive), (1, positive))
            for i in [j for j, y in enumerate(bags[1]) if y == label][:n]]  # fmt: skip
    return tuple([part[i] for i in kept] for part in bags)  # type: ignore[return-value]


def main(out: Path, seeds: int, sets: list[str], ratios: list[int]) -> None:
    lines = []
    for name in sets:
        for ratio in ratios:
            found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            began = time.monotonic()
            for seed in range(seeds):
                rng = np.random.default_rng([seed, 5])
                many, held = ((planted(n, rng) if name == "planted" else digits(n, rng, part))
                              for part, n in enumerate((2 * TRAIN, TEST)))  # fmt: skip
                learn = imbalanced(many, ratio)
                for way, own in WAYS.items():
                    model = train(MILFitConfig("", "", **own), learn[0], learn[1], 2, seed)
                    p = np.stack([told.probabilities for told in predict(model, held[0])])
                    found[way].append(classification_scores(p, np.array(held[1])))
            for way, each in found.items():
                cells = {key: [s[key] for s in each] for key in ("auroc", "balanced_accuracy", "brier")}
                lines.append({"set": name, "ratio": f"1:{ratio}", "way": way, **{
                    key: f"{np.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for key, v in cells.items()
                }})  # fmt: skip
                print(lines[-1], flush=True)
            write_rows(out / "table.csv", lines)
            print(f"{time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/imbalance"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sets", nargs="+", default=["planted", "digits"], choices=["planted", "digits"])
    parser.add_argument("--ratios", nargs="+", type=int, default=[1, 5, 10])
    arguments = parser.parse_args()
    main(arguments.out, arguments.seeds, arguments.sets, arguments.ratios)

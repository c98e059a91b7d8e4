"""Small sets of bags, and pictures to cut into tiles."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from medcl.config.mil import MILFitConfig
from medcl.mil.bags import Features, write_features

WIDTH = 6


def planted(count: int = 40, seed: int = 0) -> tuple[list[Features], list[int], list[np.ndarray]]:
    """Bags of noise; in the positive ones a fifth of the instances is shifted."""
    rng = np.random.default_rng(seed)
    bags, labels, marks = [], [], []
    for number in range(count):
        size = int(rng.integers(5, 15))
        h = rng.normal(size=(size, WIDTH)).astype(np.float32)
        mark = np.zeros(size, dtype=bool)
        if number % 2:
            mark[: max(1, size // 5)] = True
            h[mark] += 3.0
        order = rng.permutation(size)
        bags.append(Features(h[order], np.stack([np.arange(size) * 256, np.zeros(size, int)], 1)))
        labels.append(number % 2)
        marks.append(mark[order])
    return bags, labels, marks


def write_set(folder: Path, count: int = 40, groups: int = 20, encoder: str = "stub") -> Path:
    """A folder as `medcl mil prepare` writes it; two bags a group."""
    bags, labels, _ = planted(count)
    rows = []
    for number, (bag, label) in enumerate(zip(bags, labels, strict=True)):
        bag.encoder = encoder
        write_features(folder / "features" / f"bag{number:02d}.h5", bag)
        rows.append(
            [f"bag{number:02d}", f"features/bag{number:02d}.h5", ("benign", "malignant")[label], number // 2 % groups]
        )
    with open(folder / "bags.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["bag_id", "path", "label", "group"], *rows])
    return folder


def config(source, out, **more) -> MILFitConfig:
    return MILFitConfig(
        str(source), str(out), **{"folds": 4, "epochs": 15, "lr": 5e-3, "options": {"hidden": 16}, **more}
    )


def picture(path, left=(230, 120, 170), right=(250, 250, 250), size=(256, 128)):
    """Tissue on the left half, glass on the right."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2], pixels[:, size[0] // 2 :] = left, right
    noise = np.random.default_rng(0).integers(-8, 8, pixels.shape)
    Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(path)
    return path


def table(folder, *rows):
    with open(folder / "bags.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["bag_id", "path", "label", "group"], *rows])
    return str(folder / "bags.csv")

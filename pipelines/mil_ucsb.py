"""UCSB breast histology from raw images: tiles, self-supervised patch encoder, gated attention; against random weights.

    python pipelines/mil_ucsb.py ucsb_breast/bags.csv [--out runs/ucsb]

Five folds of whole tissue micro-array groups. In every fold the encoder is pretrained on the images of the training
groups alone, so that no test image is seen by anything before it is told.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medcl.config.mil import MILFitConfig, MILPrepareConfig, MILPretrainConfig
from medcl.errors import exit_on_error
from medcl.mil.audit import BagAudit, audit_bags
from medcl.mil.bag_set import load
from medcl.mil.bags import Bag, classes_of, read_bags
from medcl.mil.classifier import predict
from medcl.mil.evaluation import print_scores, score
from medcl.mil.prepare import prepare_bags
from medcl.mil.pretrain import pretrain_patches
from medcl.mil.stage import divide
from medcl.mil.training import train
from medcl.runtime.files import write_json, write_rows

FOLDS, REPEATS = 5, 3  # repeats: classifiers of other seeds
TILE = {"tile": 96, "mpp": 0.0, "tissue": 0.25}
PRETRAIN = {"method": "dcl", "encoder": "resnet18", "width": 0.5, "steps": 300, "batch_size": 48}
FIT = MILFitConfig("", "", aggregator="gated_abmil", epochs=60, lr=5e-4, options={"hidden": 128})


def write_table(path: Path, bags: Sequence[Bag]) -> str:
    write_rows(
        path, [{"bag_id": b.id, "path": str(b.path.resolve()), "label": b.label, "group": b.group} for b in bags]
    )
    return str(path)


def main(source: Path, out: Path) -> None:
    began = time.monotonic()
    bags = read_bags(source)
    classes = classes_of(bags)
    labels = np.array([classes.index(str(bag.label)) for bag in bags])
    everything = write_table(out / "bags.csv", bags)
    rows: dict[str, list[dict]] = {"pretrained": [], "untrained": []}
    audits = dict.fromkeys(rows, BagAudit())
    for fold, (learn, held) in enumerate(divide(labels, [bag.group for bag in bags], FOLDS, seed=0)):
        part = out / f"fold{fold}"
        table = write_table(part / "train.csv", [bags[i] for i in learn])
        encoders = {
            "pretrained": pretrain_patches(MILPretrainConfig(table, str(part / "encoder"), **TILE, **PRETRAIN)),
            "untrained": pretrain_patches(
                MILPretrainConfig(table, str(part / "random"), **TILE, **{**PRETRAIN, "steps": 1}, lr=1e-12)
            ),
        }
        for arm, encoder in encoders.items():
            found = load(prepare_bags(MILPrepareConfig(everything, str(part / arm), encoder=str(encoder), **TILE)))
            features = {bag.id: each for bag, each in zip(found.bags, found.features, strict=True)}
            where = {bag.id: bag for bag in found.bags}
            tested = [bags[i].id for i in held]
            audits[arm] += audit_bags([where[name] for name in tested], [features[name] for name in tested])
            for repeat in range(REPEATS):
                seen = [features[bags[i].id] for i in learn]
                model = train(FIT, seen, labels[learn].tolist(), len(classes), seed=100 * repeat + fold)
                for i, told in zip(held, predict(model, [features[bags[i].id] for i in held]), strict=True):
                    shares = {f"p_{name}": f"{p:.6g}" for name, p in zip(classes, told.probabilities, strict=True)}
                    bag = bags[i]
                    about = {"repeat": repeat, "fold": fold, "bag_id": bag.id, "group": bag.group, "label": bag.label}
                    rows[arm].append({**about, **shares})
    for arm, each in rows.items():
        write_rows(out / f"{arm}.csv", each)
        result = score(each, classes, audits[arm])
        write_json(out / f"{arm}.json", result)
        print(f"\n{arm} encoder")
        print_scores(result)
    print(f"Done in {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bags", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/ucsb"))
    arguments = parser.parse_args()
    with exit_on_error():
        main(arguments.bags, arguments.out)

"""3D bags: synthetic abdomens with and without a small lesion, labelled as a whole; does attention find the lesion?

    python pipelines/mil_lesion.py [--out runs/lesion]

A self-supervised encoder of the training scans, overlapping cells of 4 voxels as instances, the largest value of every
feature over them; scored on other scans.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import nibabel as nib
import numpy as np

import medcl
from medcl import PretrainConfig
from medcl.config.mil import MILEvaluateConfig, MILFitConfig, MILPredictConfig, MILPrepareConfig
from medcl.dataset.phantom import write_phantoms
from medcl.errors import exit_on_error
from medcl.mil.bags import read_bags
from medcl.mil.evaluation import evaluate_bags, print_scores
from medcl.mil.prepare import prepare_bags
from medcl.mil.stage import fit, predict_bags
from medcl.report.attention import draw_attention
from medcl.runtime.files import write_rows

SCANS = {"train": (80, 0), "test": (40, 2)}  # how many, seed
CELL = 4  # voxels
RADIUS, BRIGHT = 12.0, 2.0  # mm of the lesion; times the scan's 99.8th percentile, about that of fat


def plant(path: Path, label: Path, seed: int) -> np.ndarray:
    """Paints a bright ball into an organ of a scan, and returns where: (X, Y, Z) bool."""
    image, organs = nib.load(path), np.asarray(nib.load(label).dataobj)
    voxels = np.asarray(image.dataobj, dtype=np.float32)
    inside = np.argwhere(organs > 0)
    centre = nib.affines.apply_affine(image.affine, inside[np.random.default_rng(seed).integers(len(inside))])
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in voxels.shape), indexing="ij"), axis=-1)
    ball = np.linalg.norm(nib.affines.apply_affine(image.affine, grid) - centre, axis=-1) <= RADIUS
    voxels[ball] = BRIGHT * np.percentile(voxels, 99.8)
    nib.save(nib.Nifti1Image(voxels, image.affine), path)
    return ball


def peak_of(heat: np.ndarray) -> tuple[int, ...]:
    """The voxel that a reader would take for the place: the middle of all that are as high as the highest."""
    return tuple(np.argwhere(heat >= heat.max() * 0.999).mean(0).round().astype(int))


def main(out: Path) -> None:
    began = time.monotonic()
    balls: dict[str, np.ndarray] = {}
    for part, (count, seed) in SCANS.items():
        scans = write_phantoms(out / part / "scans", count, seed, shape=(40, 36, 36), weighting=0.15)
        rows = []
        for number, path in enumerate(sorted((scans / "imagesTr").glob("*.nii.gz"))):
            name = f"{part}_{path.name.split('.')[0]}"
            if number % 2:
                balls[name] = plant(path, scans / "labelsTr" / path.name, number)
            label = ("healthy", "lesion")[number % 2]
            rows.append({"bag_id": name, "path": path.resolve(), "label": label, "group": name})
        write_rows(out / f"{part}.csv", rows)
    source, more = str(out / "train" / "scans"), {"task": "mae", "steps": 150, "lr": 1e-3, "subjects": "all"}
    encoder = medcl.pretrain(PretrainConfig(source, str(out / "encoder"), options={"block": 4}, **more))
    bags = {}
    for part in SCANS:
        bags[part] = prepare_bags(MILPrepareConfig(
            str(out / f"{part}.csv"), str(out / part / "bags"), encoder=str(encoder), instances="cells",
            sub_volume=(CELL,) * 3, overlap=0.5, maps=1, pool="mean",
        ))  # fmt: skip
    settings: dict = {"aggregator": "max", "epochs": 20, "lr": 3e-3, "folds": 2, "options": {"dropout": 0.5}}
    run = fit(MILFitConfig(str(bags["train"]), str(out / "fit"), **settings))
    told = draw_attention(predict_bags(MILPredictConfig(str(run), str(bags["test"]), str(out / "told"))))
    print_scores(evaluate_bags(MILEvaluateConfig(str(told))))
    hits = []
    for bag in read_bags(out / "test.csv"):
        if bag.id in balls:
            heat = np.asarray(nib.load(told / "attention" / f"{bag.id}.nii.gz").dataobj)
            hits.append(bool(balls[bag.id][peak_of(heat)]))
    print(f"In {sum(hits)} of {len(hits)} positive scans held out the middle of the map's peak lies in the lesion.")
    print(f"Done in {time.monotonic() - began:.0f} s. Maps: {told / 'attention'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/lesion"))
    with exit_on_error():
        main(parser.parse_args().out)

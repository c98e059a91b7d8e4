"""3D bags: synthetic abdomens with and without a small lesion, labelled as a whole; does attention find the lesion?

    python pipelines/mil_lesion.py [--out runs/lesion]

A self-supervised encoder of the training scans, cells of 8 voxels as instances, gated attention; scored on other scans.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import nibabel as nib
import numpy as np

import medcl
from medcl import PretrainConfig
from medcl.checkpoint import load_weights
from medcl.config_mil import MILEvaluateConfig, MILFitConfig, MILPredictConfig, MILPrepareConfig
from medcl.data.bags import read_bags
from medcl.data.io import Volume, read_volume, to_canonical
from medcl.data.phantom import write_phantoms
from medcl.data.prepare import prepare_image
from medcl.downstream.mil_prepare import prepare_bags
from medcl.downstream.mil_stage import fit, predict_bags
from medcl.evaluation.bags import evaluate_bags, print_scores
from medcl.files import write_rows
from medcl.report.attention import draw_attention

SCANS = {"train": 80, "test": 40}
CELL = 8  # voxels
RADIUS, BRIGHT = 12.0, 1.5  # mm of the lesion; times the scan's 99.8th percentile, about that of fat


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


def top_cell(attention: Path, ball: np.ndarray, scan: Path, encoder: Path) -> np.ndarray:
    """The most attended cell's part of the lesion, on the grid of the prepared volume."""
    volume = read_volume([scan])
    marked = to_canonical(Volume(ball.astype(np.float32), volume.affine)).array
    inside = prepare_image(to_canonical(volume), load_weights(encoder)[0].plan).prepare_label(marked)
    with open(attention, newline="") as stream:
        first = next(csv.DictReader(stream))
    return inside[tuple(slice(int(first[axis]), int(first[axis]) + CELL) for axis in "xyz")]


def main(out: Path) -> None:
    began = time.monotonic()
    balls: dict[str, np.ndarray] = {}
    for seed, (part, count) in enumerate(SCANS.items()):
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
            sub_volume=(CELL,) * 3, maps=1,
        ))  # fmt: skip
    run = fit(MILFitConfig(str(bags["train"]), str(out / "fit"), epochs=40, lr=3e-3, folds=2, options={"dropout": 0.5}))
    told = draw_attention(predict_bags(MILPredictConfig(str(run), str(bags["test"]), str(out / "told"))))
    print_scores(evaluate_bags(MILEvaluateConfig(str(told))))
    touched, hits = [], []
    for bag in read_bags(out / "test.csv"):
        if bag.id in balls:
            heat = np.asarray(nib.load(told / "attention" / f"{bag.id}.nii.gz").dataobj)
            hits.append(bool(balls[bag.id][heat >= heat.max() * 0.999].any()))
            touched.append(bool(top_cell(told / "attention" / f"{bag.id}.csv", balls[bag.id], bag.path, encoder).any()))
    print(f"In {np.mean(touched):.0%} of {len(hits)} positive scans held out the top cell holds a part of the lesion;")
    print(f"in {np.mean(hits):.0%} the peak of the map on the scan's own grid lies in it.")
    print(f"Done in {time.monotonic() - began:.0f} s. Maps: {told / 'attention'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/lesion"))
    main(parser.parse_args().out)

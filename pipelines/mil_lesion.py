"""3D bags: synthetic abdomens with and without a small lesion, labelled as a whole; does attention find the lesion?

    python pipelines/mil_lesion.py [--out runs/lesion]

A self-supervised encoder of the training scans, cells of 4 voxels as instances, gated attention. Scored on scans held
out, which no step has seen: does the cell with the largest attention touch the lesion?
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import nibabel as nib
import numpy as np

import medcl
from medcl import PretrainConfig
from medcl.config_mil import MILEvaluateConfig, MILFitConfig, MILPredictConfig, MILPrepareConfig
from medcl.data.bags import read_bags
from medcl.data.phantom import write_phantoms
from medcl.downstream.mil_prepare import prepare_bags
from medcl.downstream.mil_stage import fit, predict_bags
from medcl.evaluation.bags import evaluate_bags, print_scores
from medcl.files import write_rows
from medcl.report.attention import draw_attention

SCANS = {"train": 80, "test": 40}
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
            rows.append(
                {"bag_id": name, "path": path.resolve(), "label": ("healthy", "lesion")[number % 2], "group": name}
            )
        write_rows(out / f"{part}.csv", rows)
    pretraining = PretrainConfig(
        str(out / "train" / "scans"), str(out / "encoder"), task="mae", options={"block": 4}, steps=300, lr=1e-3,
        subjects="all",
    )  # fmt: skip
    encoder = medcl.pretrain(pretraining)
    bags = {}
    for part in SCANS:
        preparing = MILPrepareConfig(
            str(out / f"{part}.csv"), str(out / part / "bags"), encoder=str(encoder), instances="cells",
            sub_volume=(4, 4, 4),
        )  # fmt: skip
        bags[part] = prepare_bags(preparing)
    run = fit(MILFitConfig(str(bags["train"]), str(out / "fit"), epochs=30, lr=1e-3, folds=2))
    told = draw_attention(predict_bags(MILPredictConfig(str(run), str(bags["test"]), str(out / "told"))))
    print_scores(evaluate_bags(MILEvaluateConfig(str(told))))
    hits = []
    for bag in read_bags(out / "test.csv"):
        if bag.id in balls:
            heat = np.asarray(nib.load(told / "attention" / f"{bag.id}.nii.gz").dataobj)
            hits.append(bool(balls[bag.id][heat >= heat.max() * 0.999].any()))
    print(f"The peak of attention lies in the lesion in {np.mean(hits):.0%} of {len(hits)} positive scans held out.")
    print(f"Done in {time.monotonic() - began:.0f} s. Maps: {told / 'attention'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/lesion"))
    main(parser.parse_args().out)

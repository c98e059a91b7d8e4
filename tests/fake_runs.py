"""A small labelled data set and scored runs on it, for the tests of evaluation and report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medcl.dataset.case import Case, Manifest, Problem
from medcl.evaluation.evaluate import score_folder
from medcl.io.nifti import write_nifti

SHAPE, SPACING = (14, 16, 8), (1.0, 1.0, 3.0)
AFFINE = np.diag([*SPACING, 1.0])


def labels(radius: float = 4.0, shift: int = 0) -> np.ndarray:
    """Two neighbouring half-ellipsoids, classes 1 and 2."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1) * SPACING
    inside = np.linalg.norm((grid - [6.5 + shift, 7.5, 10.5]) / [1, 1, 1.8], axis=-1) <= radius
    return inside * np.where(grid[..., 1] < 8, 1, 2).astype(np.uint8)


def make_data(
    root: Path, subjects: Sequence[str] = ("a", "b", "c"), frames: int = 1, names: dict[int, str] | None = None
) -> Manifest:
    """Writes images and references, `frames` cases a subject, and returns their manifest."""
    rng, cases = np.random.default_rng(0), []
    for subject in subjects:
        for frame in range(frames):
            case = f"{subject}_{frame}"
            reference = labels()
            write_nifti(
                root / "images" / f"{case}.nii.gz",
                (reference * 50 + rng.normal(100, 9, SHAPE)).astype(np.float32),
                AFFINE,
            )
            write_nifti(root / "labels" / f"{case}.nii.gz", reference, AFFINE)
            cases.append(
                Case(
                    case,
                    subject,
                    (f"images/{case}.nii.gz",),
                    f"labels/{case}.nii.gz",
                    shape=SHAPE,
                    spacing=SPACING,
                    orientation="RAS",
                )
            )
    names = {0: "background", 1: "front", 2: "back"} if names is None else names
    problems = (Problem("DOE_JOHN.nii.gz", "the file is empty (0 bytes)", "Copy it again."),)
    return Manifest(str(root), "names", "one file is one subject", tuple(cases), problems, names)


def make_run(
    run: Path, manifest: Manifest, *, draw: int = 0, init: str = "none", good: float = 0.5, seed: int = 0, **config
) -> Path:
    """Writes a scored fine-tuning run: the larger `good` (0 to 1), the nearer its predictions are to the references."""
    rng = np.random.default_rng([seed, draw])
    for case in manifest.cases:
        predicted = labels(4.0 - rng.uniform(0.2, 1.6) * (1 - good))
        write_nifti(run / "test" / f"{case.id}.nii.gz", predicted, AFFINE)
    options = {"stage": "finetune", "init": init, "labels": "2", "draw": draw, "steps": 100, "out": str(run), **config}
    (run / "config.yaml").write_text(json.dumps(options))  # JSON is YAML
    split = {"train": ["x", "y"], "val": ["v"], "test": list(manifest.subjects), "labelled": ["x", "y"]}
    (run / "split.json").write_text(json.dumps(split))
    manifest.save(run / "manifest.json")
    score_folder(run / "test", manifest, run / "test", subjects=manifest.subjects)
    return run

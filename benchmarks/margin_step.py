"""A fine-tuning step with the margin that augmentation needs, against the same step that reads the patch alone.

    python benchmarks/margin_step.py [--sides 128] [--patches 32 64] [--clock cpu]

A step is what training does: reads from the store, augmentation, forward and backward pass, and the optimiser.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sidebyside import begin, rounds_of, tell, verdict

MOST = 1.15  # a step with a margin may take this much of one without
STEPS = 4  # of a round


class Bare:
    """What `SegmentationModule.training_step` asks of Lightning's trainer."""

    trainer = SimpleNamespace(global_step=0)

    def optimizers(self) -> Any:
        return SimpleNamespace(param_groups=[{"lr": 0.0}])

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


def volumes(folder: Path, side: int, count: int = 4) -> list[Path]:
    """Smooth random volumes with a label, in the store."""
    from scipy.ndimage import zoom

    from medcl.store.volumes import write_volume

    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        image = zoom(rng.standard_normal((side // 8,) * 3).astype(np.float32), 8, order=1)
        label = (image > 1).astype(np.uint8)
        points = {"1": np.argwhere(label)[:200].tolist()}
        paths.append(folder / str(number))
        meta = {"case": str(number), "subject": str(number), "foreground": points, "voxel_hash": str(number)}
        write_volume(paths[-1], image + 0.05 * rng.standard_normal(image.shape, dtype=np.float32), label, meta)
    return paths


def step_of(paths: list[Path], patch: int, margin: tuple[int, int, int], batch: int) -> Callable[[], None]:
    """One round: a few steps on patches that the store has to be read for."""
    from torch.utils.data import default_collate

    from medcl.config import FinetuneConfig
    from medcl.networks.backbones import BackboneSpec, build_backbone
    from medcl.runtime.optimizer import adamw
    from medcl.segmentation.module import SegmentationModule
    from medcl.store.crops import CropDataset
    from medcl.transforms.compose import strong_augmentation

    class Module(Bare, SegmentationModule):  # type: ignore[misc]
        pass

    torch.manual_seed(0)
    backbone = build_backbone(BackboneSpec("unet", 1, 2, ((2, 2, 2),) * 3))
    dataset = CropDataset(paths, (patch,) * 3, 0, True, 0.5, margin)
    config = FinetuneConfig("scans", "run", steps=100, batch_size=batch)
    spacing = (1.0, 1.0, 1.0)
    augmentation = strong_augmentation("MR", spacing, margin=margin)
    module = Module(backbone, dataset, config, augmentation, (1,), spacing)
    optimizer = adamw(module, 1e-3, 0.01, 100, 0.05)["optimizer"]
    number = iter(range(10**6))

    def call() -> None:
        for _ in range(STEPS):
            rows = default_collate([dataset[next(number)] for _ in range(batch)])
            optimizer.zero_grad()
            module.training_step({"labelled": rows}, 0).backward()
            optimizer.step()

    return call


def main() -> bool:
    args = begin(
        __doc__,
        ("--sides", {"type": int, "nargs": "+", "default": [128], "help": "voxels along a volume's axis"}),
        ("--patches", {"type": int, "nargs": "+", "default": [32, 64], "help": "voxels along a patch's axis"}),
        ("--batch", {"type": int, "default": 4, "help": "patches a step"}),
    )
    from medcl.transforms.compose import strong_augmentation
    from medcl.transforms.margin import margin_for

    kept = True
    with tempfile.TemporaryDirectory() as folder:
        for side in args.sides:
            paths = volumes(Path(folder) / str(side), side)
            for patch in args.patches:
                room = (side - patch,) * 3
                margin = margin_for(strong_augmentation(), (patch,) * 3, (1.0, 1.0, 1.0), room)
                wide, narrow = f"margin of {margin[0]}", "no margin"
                arms = {wide: step_of(paths, patch, margin, args.batch),
                        narrow: step_of(paths, patch, (0, 0, 0), args.batch)}  # fmt: skip
                spent = rounds_of(arms, args.rounds, clock=args.clock)
                found = tell(f"patches of {patch}³ in volumes of {side}³", spent, STEPS, "steps/s", wide)
                kept &= verdict("a step with the margin takes", 1 / found[narrow], MOST, least=False)
    return kept


if __name__ == "__main__":
    raise SystemExit(not main())

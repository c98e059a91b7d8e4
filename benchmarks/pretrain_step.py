"""A pretraining step fed from the store against the same step on a batch already in memory: the share lost to data.

    python benchmarks/pretrain_step.py                                                       # the default, on a CPU
    python benchmarks/pretrain_step.py --backbone swin_unetr --crop 96 --precision bf16      # on a GPU

Without MONAI, a plain convolutional network of torch stands in for the backbone. On a GPU the rate of a large matrix
product is measured as well, and the share of it that the step reaches.
"""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sidebyside import begin, rounds_of, spread, verdict
from torch import nn

from medcl.config import PretrainConfig
from medcl.networks.backbones import Backbone, BackboneSpec, build_backbone
from medcl.pretext.registry import task_class
from medcl.runtime.precision import autocast, choose_precision
from medcl.store.crops import ReadDataset, StepBatches, crop_loader, join_reads
from medcl.store.plan import Plan

STEPS = 10_000_000  # more than will be run


class StandIn(Backbone):
    """Strided convolutions with instance norm, where MONAI is not installed."""

    default_width = 24

    def __init__(self, spec: BackboneSpec):
        self.channels = tuple((spec.width or self.default_width) * 2**level for level in range(len(spec.strides)))
        self.reductions = tuple((2**level,) * 3 for level in range(1, len(spec.strides) + 1))  # type: ignore[assignment]
        super().__init__(spec)

    def _build(self) -> nn.Module:
        widths = [self.spec.in_channels, *self.channels]
        return nn.ModuleList(
            nn.Sequential(nn.Conv3d(a, b, 3, 2, 1), nn.InstanceNorm3d(b, affine=True), nn.GELU(),
                          nn.Conv3d(b, b, 3, 1, 1), nn.InstanceNorm3d(b, affine=True), nn.GELU())
            for a, b in itertools.pairwise(widths)
        )  # fmt: skip

    def monai_arguments(self) -> tuple[str, dict[str, Any]]:
        return "", {}

    def encoder_modules(self) -> list[nn.Module]:
        return list(self.net)

    def head_modules(self) -> list[nn.Module]:
        return []

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for block in self.net:
            x = block(x)
            maps.append(x)
        return maps

    def decode(self, features: Any, blocks: int | None = None) -> torch.Tensor:
        return features[-1]


def volumes(folder: Path, count: int, side: int) -> list[Path]:
    """Smooth volumes with noise, in the store."""
    from medcl.store.volumes import write_volume

    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        coarse = rng.standard_normal((side // 8,) * 3, dtype=np.float32)
        image = coarse.repeat(8, 0).repeat(8, 1).repeat(8, 2)
        image += 0.1 * rng.standard_normal(image.shape, dtype=np.float32)
        paths.append(folder / str(number))
        write_volume(paths[-1], image, None, {"case": str(number), "foreground": {}})
    return paths


def matrix_rate(device: torch.device) -> float:
    """Multiply-adds times two a second of a bf16 product of 8192 square matrices."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    spent = []
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
    return 2 * 8192**3 / min(spent)


def main() -> None:
    args = begin(
        __doc__,
        ("--task", {"default": PretrainConfig.task}),
        ("--backbone", {"default": "unet"}),
        ("--width", {"type": int, "default": 0}),
        ("--volumes", {"type": int, "default": 8}),
        ("--side", {"type": int, "default": 128, "help": "voxels along an axis of a volume"}),
        ("--crop", {"type": int, "default": 0, "help": "voxels along an axis of a fine-tuning patch"}),
        ("--batch", {"type": int, "default": 4}),
        ("--steps", {"type": int, "default": 3, "help": "steps a round"}),
        ("--precision", {"default": "32", "choices": ("auto", "32", "bf16", "16")}),
        ("--workers", {"type": int, "default": 0}),
        ("--compile", {"action": "store_true"}),
        ("--channels_last", {"action": "store_true"}),
        ("--parts", {"type": int, "default": 1}),
        ("--device", {"default": "cuda" if torch.cuda.is_available() else "cpu"}),
    )
    from medcl.networks.parts import compile_network
    from medcl.runtime.memory import keep_memory

    keep_memory()
    device = torch.device(args.device)
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    precision = choose_precision(args.precision, accelerator)
    plan = Plan(volume_size=(args.side,) * 3)
    size = args.crop or (48 if accelerator == "cpu" else 96)
    plan = replace(plan, patch_size=(size,) * 3)
    if args.backbone == "swin_unetr":
        plan = replace(plan, strides=((2, 2, 2),) * 5)
    spec = BackboneSpec(args.backbone, strides=plan.strides, width=args.width)
    torch.manual_seed(0)
    if importlib.util.find_spec("monai") is None:
        print("MONAI is not installed: a plain convolutional network stands in.")
        backbone: Backbone = StandIn(spec)
    else:
        backbone = build_backbone(spec)
    task = task_class(args.task)(backbone, plan, {}).to(device)
    backbone.parts = args.parts
    if args.channels_last:
        task = task.to(memory_format=torch.channels_last_3d)
    if args.compile:
        compile_network(backbone)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], fused=accelerator == "cpu")

    def step(batch: dict[str, torch.Tensor]) -> None:
        batch = {k: v if k == "seed" else v.to(device, non_blocking=True) for k, v in batch.items()}
        with torch.no_grad():
            views = task.views(batch)
        optimizer.zero_grad()
        with autocast(precision, accelerator):
            loss = task.loss(views)["loss"]
        loss.backward()
        optimizer.step()
        task.after_step(0.0)

    with tempfile.TemporaryDirectory(prefix="medcl-bench-") as folder:
        paths = volumes(Path(folder), args.volumes, args.side)
        dataset = ReadDataset(paths, task.read_size, 0, task.places)
        loader = iter(crop_loader(dataset, StepBatches(args.batch, 0, STEPS), args.workers, pin=device.type == "cuda"))
        kept = {
            k: v if k == "seed" else v.to(device)
            for k, v in join_reads([dataset[n] for n in range(args.batch)]).items()
        }

        def run(batches: Any) -> None:
            for _ in range(args.steps):
                step(batches())
            if device.type == "cuda":
                torch.cuda.synchronize()

        arms = {"from the store": lambda: run(lambda: next(loader)), "from memory": lambda: run(lambda: kept)}
        spent = rounds_of(arms, args.rounds, warm=2 if args.compile else 1, clock=args.clock)
    print(f"\n{args.task} on {args.backbone}, batch {args.batch}, reads of {task.read_size}, {precision}, {device}")
    for name, values in spent.items():
        print(f"  {name:<16} {spread([1e3 * v / args.steps for v in values])} ms a step")
    lost = [1 - b / a for a, b in zip(*spent.values(), strict=True)]
    print(f"  share lost to data {spread(lost, '{:.1%}')}")
    verdict("share lost to data", max(0.0, sorted(lost)[len(lost) // 2]), 0.05, least=False)
    if device.type == "cuda":
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            step(kept)
        rate = counter.get_total_flops() * args.steps / sorted(spent["from the store"])[args.rounds // 2]
        most = matrix_rate(device)
        print(f"  {rate / 1e12:.1f} TFLOP/s of {most / 1e12:.0f} in a bf16 matrix product: {rate / most:.1%}; "
              f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")  # fmt: skip


if __name__ == "__main__":
    main()

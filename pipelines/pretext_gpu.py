"""Every pretext task once with `swin_unetr` on crops of 96 voxels in bf16, on a GPU: losses, ranks, time and memory.

    python pipelines/pretext_gpu.py SCANS [--out runs/gpu] [--steps 2000] [--batch_size 2]

SCANS are volumes of 96 voxels or more along each axis at the spacing of the plan. Each task leaves a run folder with
its report, and a line in `table.md` beside them. Runs that are done are not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from statistics import median
from typing import Any

import medcl
from medcl import PretrainConfig, ReportConfig
from medcl.errors import exit_on_error

SIZE = [96, 96, 96]
# options that are not a task's own defaults; a task that is not named here has none
OPTIONS: dict[str, dict[str, Any]] = {
    "voco": {"crop_size": [48, 48, 48], "grid": [2, 2, 2]},  # eight base crops tile the 96 voxels
    "global_contrast": {"partitions": [1, 1, 4], "size": [96, 96, 24]},  # a quarter of the body's length each
    "global_local": {"global_contrast": {"partitions": [1, 1, 4], "size": [96, 96, 24]}},
    "local_contrast": {"size": SIZE, "freeze_encoder": False},  # a frozen one would be random
}
HEAD = "| task | loss | trivial | rank before, after | steps a second | time | GiB |\n|---|---|---|---|---|---|---|"


def options_of(task: str) -> dict[str, Any]:
    from medcl.pretext.registry import task_class

    sized = "size" in {field.name for field in dataclasses.fields(task_class(task).Options)}
    return OPTIONS.get(task, {"size": SIZE} if sized else {})


def row_of(task: str, run: Path, seconds: float, memory: float) -> str:
    """A line of the table from a run's `metrics.csv`."""
    from medcl.runtime.run import read_metrics

    rows = read_metrics(run)
    last = rows[-max(1, len(rows) // 3) :]
    loss = median(row["loss"] for row in last if "loss" in row)
    trivial = {
        name.removeprefix("trivial_"): median(row[name] for row in last if name in row)
        for name in dict.fromkeys(key for row in last for key in row if key.startswith("trivial_"))
    }
    lines = ", ".join(f"{name} {value:.3g}" for name, value in trivial.items())
    ranks = ", ".join(f"{row[name]:.3g}" for row in rows for name in ("rank_before", "rank_after") if name in row)
    steps = max(row["step"] for row in rows)
    return f"| {task} | {loss:.3g} | {lines} | {ranks} | {steps / seconds:.2f} | {seconds:.0f} s | {memory:.1f} |"


def main(args: argparse.Namespace) -> None:
    import torch

    from medcl.pretext.registry import TASKS

    out = Path(args.out)
    lines = [HEAD]
    for task in TASKS:
        run, row = out / task, out / task / "row.md"
        if not row.exists():
            began = time.monotonic()
            if args.accelerator == "gpu":
                torch.cuda.reset_peak_memory_stats()
            config = PretrainConfig(
                args.source, str(run), task=task, options=options_of(task), backbone=args.backbone, width=args.width,
                steps=args.steps, batch_size=args.batch_size, lr=1e-4, rank_weight=args.rank_weight, precision="bf16",
                accelerator=args.accelerator, workers=args.workers, resume=(run / "config.yaml").exists(),
            )  # fmt: skip
            medcl.pretrain(config)
            memory = torch.cuda.max_memory_allocated() / 2**30 if args.accelerator == "gpu" else float("nan")
            medcl.write_report(ReportConfig(str(run)))
            row.write_text(row_of(task, run, time.monotonic() - began, memory), encoding="utf-8")
        lines.append(row.read_text(encoding="utf-8"))
        (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of scans")
    parser.add_argument("--out", default="runs/gpu")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--backbone", default="swin_unetr")
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--rank_weight", type=float, default=0.0)
    parser.add_argument("--accelerator", default="gpu", choices=("gpu", "cpu"))
    parser.add_argument("--workers", type=int, default=8)
    with exit_on_error():
        main(parser.parse_args())

"""Which floating-point numbers a training runs in: what the user says, or what is faster where it runs."""

from __future__ import annotations

import contextlib
import functools
import time
from pathlib import Path
from typing import Any

import torch

from medcl.errors import MedclError
from medcl.runtime.files import read_json, write_json

NAMES = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
KEPT = "precision.json"
WORTH_IT = 0.9  # bf16 must take less than this share of the time of float32


def choose_precision(wish: str, accelerator: str, run: str | Path = "") -> str:
    """Lightning's precision for `auto`, `32`, `bf16` or `16`.

    bf16 on a CPU pays only where the CPU multiplies in it, and not on all that do: there a block is timed in both.

    Args:
        wish: what the user says.
        accelerator: `cpu` or `gpu`.
        run: folder of a run whose choice is kept, so that going on with it gives equal weights.

    Raises:
        MedclError: an unknown precision, or 16-bit floats without a GPU.
    """
    if wish in NAMES:
        if wish == "16" and accelerator == "cpu":
            raise MedclError("16-bit floats need a GPU", "--precision", "Use auto, 32 or bf16.")
        return NAMES[wish]
    if wish != "auto":
        raise MedclError(f"unknown precision {wish!r}", "--precision", "Use auto, 32, bf16 or 16.")
    kept = Path(run) / KEPT
    if run and kept.exists():
        made = read_json(kept)
        if made.get("accelerator") == accelerator and made.get("precision") in NAMES.values():
            return str(made["precision"])
    if accelerator == "gpu":
        return NAMES["bf16" if torch.cuda.is_bf16_supported() else "16"]
    cpu = torch.cpu
    able = cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
    return NAMES["bf16" if able and _bf16_is_faster() else "32"]


def name_of(precision: str) -> str:
    """What a user would say for one of Lightning's precisions."""
    return next(name for name, full in NAMES.items() if full == precision)


def keep_precision(run: Path, precision: str, accelerator: str) -> None:
    """Notes the choice in the run's folder: a timing may come out otherwise the next time."""
    write_json(run / KEPT, {"precision": precision, "accelerator": accelerator})


def autocast(precision: str, accelerator: str) -> contextlib.AbstractContextManager[Any]:
    """The autocast context that Lightning uses for this precision, for code outside the trainer."""
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast("cuda" if accelerator == "gpu" else "cpu", dtype)


@functools.lru_cache(maxsize=1)
def _bf16_is_faster() -> bool:
    """Asked once a process, so that runs in one process agree."""
    return _seconds(True) < WORTH_IT * _seconds(False)


def _seconds(bf16: bool, repeats: int = 4) -> float:
    """The least time of a forward and backward pass of a small convolutional block; leaves no random state behind.

    Of the CPU, not of the clock: other jobs of the machine must not decide it.
    """
    from torch import nn

    with torch.random.fork_rng(), torch.enable_grad():
        block = nn.Sequential(*(nn.Conv3d(a, b, 3, padding=1) for a, b in ((1, 16), (16, 32), (32, 16))))
        image = torch.zeros(2, 1, 24, 24, 24)
        spent = []
        for _ in range(repeats):
            began = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = block(image)
            out.float().sum().backward()
            spent.append(time.process_time() - began)
    return min(spent)

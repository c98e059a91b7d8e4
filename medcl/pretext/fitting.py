"""Batch and crop size for the memory at hand: `--batch_size 0`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from medcl.errors import MedclError
from medcl.networks.parts import MOST_PARTS
from medcl.runtime.memory import MARGIN, MOST, fitting_batch, free_cache, free_memory, out_of_memory, peak_of
from medcl.runtime.run import log
from medcl.store.plan import Plan

SHRINK = 0.8  # of every axis of the patch, where nothing else makes a step fit


def fit_to_memory(
    build: Callable[[Plan], Any], plan: Plan, volumes: int, accelerator: str, budget: float | None = None
) -> tuple[Any, Plan, int]:
    """Measures steps until one fits: first in more parts, then on smaller crops; then as many volumes as fit.

    Args:
        build: a module for a plan, with `trial(volumes)` to run a step of it and `task`.
        plan: to begin with.
        volumes: different volumes that there are.
        accelerator: `cpu` or `gpu`.
        budget: bytes; by default what is free.

    Returns:
        The module, its plan and the batch size.

    Raises:
        MedclError: no crop is small enough.
    """
    while True:
        module = build(plan)
        least = max(1, module.task.needs_volumes)
        bytes_free = free_memory(accelerator) if budget is None else budget
        while True:
            peak = functools.partial(_peak, module, accelerator)
            batch = fitting_batch(peak, bytes_free, least, max(least, min(MOST[accelerator], volumes)))
            backbone = module.task.backbone
            if batch or backbone.parts >= MOST_PARTS or backbone.spec.norm == "batch":
                break
            backbone.parts *= 4
        if batch:
            parts_note = f", rows in {backbone.parts} parts" if backbone.parts > 1 else ""
            log.info("Batch of %d volumes%s: what fits into %.1f GiB with a margin of %.0f%%.",
                     batch, parts_note, bytes_free / 2**30, 100 * (1 - MARGIN))  # fmt: skip
            return module, plan, batch
        smaller = shrunk(plan)
        if smaller == plan:
            raise MedclError("no step fits into memory", "--batch_size 0", "Use a narrower --width, or free memory.")
        log.warning("No step fits into memory: crops are planned for patches of %s instead of %s voxels.",
                    smaller.patch_size, plan.patch_size)  # fmt: skip
        plan = smaller


def shrunk(plan: Plan) -> Plan:
    """The plan with a smaller patch, still a multiple of the strides; the same plan where there is none."""
    a, b, c = (
        max(step, math.floor(SHRINK * n / step) * step)
        for n, step in zip(plan.patch_size, plan.total_stride, strict=True)
    )
    return replace(plan, patch_size=(a, b, c))


def _peak(module: Any, accelerator: str, rows: int) -> float:
    try:
        return peak_of(lambda: module.trial(rows, accelerator), accelerator)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    free_cache()
    return math.inf

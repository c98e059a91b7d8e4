"""Memory: what there is, what a step takes, how large a batch fits, and what to do when one does not.

A batch is chosen from two measured steps, on the assumption that memory grows linearly with it.
"""

from __future__ import annotations

import ctypes
import gc
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from medcl.errors import MedclError
from medcl.networks.backbones import Backbone
from medcl.networks.parts import MOST_PARTS
from medcl.runtime.run import log

MARGIN = 0.85  # of the memory at hand is planned with
MOST = {"cpu": 8, "gpu": 64}  # volumes a step; on a CPU time runs out before memory
USUAL = 4
GLIBC = {"mmap_threshold": (-3, 32 << 20), "trim_threshold": (-1, 1 << 30), "top_pad": (-2, 64 << 20)}


def keep_memory() -> bool:
    """Has glibc keep freed blocks for the next step rather than hand them back to the system and fault them in again.

    A step allocates and frees the same large tensors over and over. Measured: a tenth less processor time, equal peak.
    No effect, and False, with another allocator or system.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in GLIBC.values())


def out_of_memory(error: BaseException) -> bool:
    """Whether torch or the system ran out of memory."""
    words = ("out of memory", "can't allocate memory", "cannot allocate memory")
    known = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, known) or (isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words))


class RetrySmaller(pl.LightningModule):
    """A training step that runs out of memory is taken again with its rows in more parts.

    The gradient is equal (see `medcl.networks.parts`), except with batch normalisation, which is refused.
    """

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        while True:
            try:
                return super().optimizer_step(*args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if self.trainer.world_size > 1:  # the others may have gone past this step's exchange already
                    remedy = "Raise --parts, or lower --batch_size, and --resume."
                    raise MedclError("out of memory", f"process {self.global_rank}", remedy) from error
                backbone: Any = self.task.backbone if hasattr(self, "task") else self.backbone  # type: ignore[union-attr]
                make_room(backbone, f"Step {self.trainer.global_step + 1}", error)
                for module in self.modules():  # a teacher may be what ran out of it
                    if isinstance(module, Backbone):
                        module.parts = backbone.parts
            for parameter in self.parameters():
                parameter.grad = None
            free_cache()


def make_room(backbone: Any, where: str, error: BaseException) -> None:
    """Doubles the parts that a step is taken in.

    Raises:
        MedclError: more parts would not help, or would change the gradient.
    """
    free_cache()
    if backbone.spec.norm == "batch" or backbone.parts >= MOST_PARTS:
        remedy = "Lower --batch_size, or the patch_size in plan.json and pass it with --plan."
        raise MedclError("out of memory", where, remedy) from error
    backbone.parts *= 2
    log.warning(
        "%s ran out of memory. It is taken again with its rows in %d parts, as are all that follow: equal gradient, "
        "about a third more time.", where, backbone.parts,
    )  # fmt: skip


def free_cache() -> None:
    """Frees what Python no longer needs, and torch's cached blocks of GPU memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_memory(accelerator: str) -> float:
    """Bytes that a step may take beyond what is held now; infinite where the system does not say."""
    if accelerator == "gpu":
        free, _ = torch.cuda.mem_get_info()
        return float(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    available = float("inf")
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024.0
        group = Path("/sys/fs/cgroup")
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = float((group / "memory.current").read_text()) - float(held["inactive_file"])  # a cache gives way
            available = min(available, float(most) - used)
    except (OSError, KeyError, ValueError):
        return available  # what is known so far
    return available


def peak_of(call: Callable[[], Any], accelerator: str) -> float:
    """Bytes that `call` takes at its height beyond what is held before; NaN where that cannot be measured."""
    free_cache()
    before: float
    if accelerator == "gpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return float(torch.cuda.max_memory_allocated() - before)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        before = _resident("VmRSS")
        call()
        return max(0.0, _resident("VmHWM") - before)
    except OSError:
        call()
        return float("nan")


def _resident(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024.0
    raise OSError(name)


def fitting_batch(peak: Callable[[int], float], budget: float, least: int, most: int) -> int:
    """The largest batch whose step fits into the budget with a margin; 0 where not even the least does.

    Args:
        peak: bytes that a step with so many volumes takes; infinite where it runs out of memory.
        budget: bytes at hand.
        least, most: volumes a step. Where memory cannot be measured, the usual batch is taken.
    """
    budget *= MARGIN
    one = peak(least)
    if math.isnan(one):
        return min(most, max(least, USUAL))
    if not one <= budget:
        return 0
    if most <= least:
        return least
    two = peak(2 * least)
    each = max((two - one) / least, one / (8 * least), 1.0)  # noise must not promise that more volumes cost nothing
    if not two <= budget:
        return least
    return int(min(most, least + (budget - one) // each))

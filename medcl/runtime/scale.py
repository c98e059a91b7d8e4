"""Several processes that train one network: who leads, who follows, and Lightning's strategy for it.

The first process scans, prepares and writes the run folder; the others wait for its manifest and read what it wrote.
Lightning starts the processes of one machine itself; `torchrun` and SLURM start those of several.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from medcl.errors import MedclError

LOOK_EVERY = 0.5  # seconds between two looks for the first process's manifest


def check_scale(config: Any, accelerator: str) -> None:
    """Refuses a number of devices or a strategy that cannot work.

    Raises:
        MedclError: see there.
    """
    if config.strategy == "fsdp" and processes(config) == 1:
        raise MedclError("one process has nobody to share weights with", "--strategy fsdp", "Raise --devices.")
    if config.strategy == "fsdp" and not hands_back():
        raise MedclError("needs torch 2.8 or newer", "--strategy fsdp", "Use --strategy ddp, or a newer torch.")
    if accelerator == "gpu":
        import torch

        seen = torch.cuda.device_count()
        if config.devices > seen:
            raise MedclError(f"{config.devices} GPUs a machine are more than the {seen} there are", "--devices")


def hands_back() -> bool:
    """Whether torch can give gathered weights back after every forward pass: before 2.8 it keeps the outermost ones."""
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 8)


def processes(config: Any) -> int:
    """How many processes train together."""
    return int(config.devices * config.nodes)


def rank_of(config: Any) -> int:
    """This process's number among all that train together; 0 where there is one."""
    if processes(config) == 1:
        return 0
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return int(os.environ.get("NODE_RANK", "0")) * int(config.devices) + local_rank()


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0")


def is_follower(config: Any) -> bool:
    """Whether this process leaves reading the source and writing the run folder to another one."""
    return rank_of(config) > 0


def await_leader(config: Any) -> Path | None:
    """The run folder once the first process has written its manifest; None where this process is the first."""
    if not is_follower(config):
        return None
    run = Path(config.out)
    while not (run / "manifest.json").exists():
        time.sleep(LOOK_EVERY)  # no limit: it may prepare for hours, and the launcher ends us where it fails
    return run


def strategy_for(config: Any) -> Any:
    """Lightning's `strategy`."""
    if processes(config) == 1:
        return "auto"
    if config.strategy == "fsdp":
        from pytorch_lightning.strategies import ModelParallelStrategy

        # checkpoints of whole tensors: any number of processes goes on from them
        return ModelParallelStrategy(processes(config), 1, save_distributed_checkpoint=False)
    from pytorch_lightning.strategies import DDPStrategy

    return DDPStrategy(find_unused_parameters=True)  # a task may leave the decoder alone

"""Settings that several stages share, each written once; a stage's dataclass is composed of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medcl.config.kinds import Accelerator, Count, Natural, NonNegative, Positive, Precision, ShareBelowOne


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Scans and prepared volumes.

    Args:
        plan: a plan.json (or a run folder) to prepare by; by default one is derived from the scans.
        n4: correct the MRI bias field with N4 first (slow).
        store: folder for prepared volumes, or an fsspec address such as `s3://bucket/store`; by default `$MEDCL_STORE`,
            or `~/.cache/medcl`.
        channel: which channel of 4D files to take.
        yes: take what was guessed of the scans where `medcl scan` asks.
        nan: reject leaves out volumes with NaN or infinite voxels, zero takes those as 0 (in a CT: water).
    """

    plan: str = ""
    n4: bool = False
    store: str = ""
    channel: int | None = None
    yes: bool = False
    nan: Literal["reject", "zero"] = "reject"


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """Subjects that are held out.

    Args:
        test_fraction: share of labelled subjects held out for test.
        val_fraction: share of labelled subjects held out for validation.
        split_seed: seed of the split into training, validation and test subjects.
    """

    test_fraction: ShareBelowOne = 0.25
    val_fraction: ShareBelowOne = 0.1
    split_seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Steps and optimiser.

    Args:
        steps: optimiser steps.
        lr: peak learning rate.
        weight_decay: AdamW weight decay.
        warmup: share of the steps over which the learning rate rises linearly.
        checkpoint_every: steps between checkpoints.
        resume: go on from the last checkpoint of `out`.
    """

    steps: Count = 1000
    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.01
    warmup: ShareBelowOne = 0.05
    checkpoint_every: Count = 200
    resume: bool = False


@dataclass(frozen=True, kw_only=True)
class HardwareSettings:
    """Devices, processes and memory.

    Args:
        precision: auto takes bf16 where the hardware multiplies in it, else 16 on a GPU and 32 on a CPU.
        accelerator: what to train on.
        workers: processes that read crops while training; 0 reads ahead in a thread, which is best on few cores.
        parts: in how many parts the rows of a step go through the network, one after another: equal gradient, less
            memory, about a third more time. A step that runs out of memory doubles it by itself.
        compile: compile the network with torch.compile: minutes at the start, for long runs on a GPU.
        devices: GPUs a machine (on a CPU: processes) that train together, each on `batch_size` samples.
        nodes: machines; start the command on each by `torchrun` or `srun`.
        strategy: auto or ddp, each with all weights; or, in pretraining, fsdp, each with a share of weights and
            optimiser state.
    """

    precision: Precision = "auto"
    accelerator: Accelerator = "auto"
    workers: Natural = 0
    parts: Count = 1
    compile: bool = False
    devices: Count = 1
    nodes: Count = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"

"""One frozen dataclass a stage: the command line, the YAML files and the Python API all take these.

Imports nothing heavy, so that `medcl --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, TypeVar

from medcl.config.benchmark import BenchmarkConfig as BenchmarkConfig
from medcl.config.mil import MILEvaluateConfig as MILEvaluateConfig
from medcl.config.mil import MILFitConfig as MILFitConfig
from medcl.config.mil import MILPredictConfig as MILPredictConfig
from medcl.config.mil import MILPrepareConfig as MILPrepareConfig
from medcl.config.mil import MILPretrainConfig as MILPretrainConfig
from medcl.config.results import AuditConfig as AuditConfig
from medcl.config.results import CompareConfig as CompareConfig
from medcl.config.results import DoctorConfig as DoctorConfig
from medcl.config.results import EvaluateConfig as EvaluateConfig
from medcl.config.results import ExportConfig as ExportConfig
from medcl.config.results import PredictConfig as PredictConfig
from medcl.config.results import ReportConfig as ReportConfig
from medcl.errors import MedclError

T = TypeVar("T")


@dataclass(frozen=True)
class ScanConfig:
    """What is in a folder of scans.

    Args:
        source: folder to look through.
        out: where to write the manifest; by default `manifest.json` in the current folder.
        channel: which channel of 4D files to take; 4D files are set aside without it.
        quick: read headers only, no voxels.
        json: print a machine-readable summary instead of the tables.
        workers: processes; 0 takes one a core.
    """

    source: str
    out: str = "manifest.json"
    channel: int | None = None
    quick: bool = False
    json: bool = False
    workers: int = 0


@dataclass(frozen=True)
class PrepareConfig:
    """Bring scans to one orientation, spacing and intensity scale, in a store of randomly readable volumes.

    Args:
        source: folder of scans, or a manifest written by `medcl scan`.
        plan: a plan.json (or a run folder) to prepare by; by default one is derived from the scans.
        spacing: voxel size in mm to resample to, instead of the derived one.
        n4: correct the MRI bias field with N4 first (slow).
        store: folder for prepared volumes, or an fsspec address such as `s3://bucket/store`; by default `$MEDCL_STORE`,
            or `~/.cache/medcl`.
        channel: which channel of 4D files to take.
        workers: processes; 0 takes one a core.
        dask: `local`, or the address of a Dask scheduler whose workers see the same scans and store.
    """

    source: str
    plan: str = ""
    spacing: tuple[float, float, float] | None = None
    n4: bool = False
    store: str = ""
    channel: int | None = None
    workers: int = 0
    dask: str = ""


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain an encoder on unlabelled scans.

    Args:
        source: folder of scans, or a manifest written by `medcl scan`.
        out: run folder to write.
        task: pretext task.
        options: options of the task, such as `--options.momentum 0.99`.
        backbone: network: unet, dynunet or swin_unetr.
        width: channels of the network's first level; 0 takes the backbone's default.
        norm: normalisation layers: instance, layer or batch.
        spatial_dims: 3; or 2 for a network that sees every axial slice by itself, as published slice-wise methods do.
        subjects: `auto` leaves out the validation and test subjects that `finetune` on this folder will use, where
            enough subjects are labelled to hold some out; `all` takes every subject.
        test_fraction: share of labelled subjects held out for test.
        val_fraction: share of labelled subjects held out for validation.
        split_seed: seed of the split into training, validation and test subjects.
        init: run folder whose weights to start from, with its plan; or `none`.
        steps: optimiser steps.
        batch_size: volumes a step, on each device; 0 takes what fits into memory, by measured steps.
        lr: peak learning rate.
        weight_decay: AdamW weight decay.
        warmup: share of the steps over which the learning rate rises linearly.
        rank_weight: weight of a term that keeps the features from falling into few directions (their coding rate); 0
            trains by the task's own loss alone.
        seed: seed of the weights, crops and augmentation.
        precision: auto, 32, bf16 or 16; auto takes bf16 where the hardware multiplies in it, else 16 on a GPU and
            32 on a CPU.
        accelerator: auto, cpu or gpu.
        checkpoint_every: steps between checkpoints.
        stop_on_collapse: end the run where the loss stands still at a trivial solution, or the features' rank falls.
        probe: labelled training subjects on which frozen features are probed while training; 0 for none. Their labels
            are not trained on.
        probe_every: steps between two probes; 0 takes a tenth of the steps.
        resume: go on from the last checkpoint of `out`.
        plan: a plan.json (or a run folder) to prepare by; by default one is derived from the scans.
        n4: correct the MRI bias field with N4 first (slow).
        store: folder for prepared volumes, or an fsspec address such as `s3://bucket/store`; by default `$MEDCL_STORE`,
            or `~/.cache/medcl`.
        channel: which channel of 4D files to take.
        workers: processes that read crops while training; 0 reads ahead in a thread, which is best on few
            cores.
        parts: in how many parts the rows of a step go through the network, one after another: equal gradient, less
            memory, about a third more time. A step that runs out of memory doubles it by itself.
        compile: compile the network with torch.compile: minutes at the start, for long runs on a GPU.
        devices: GPUs a machine (on a CPU: processes) that train together, each on `batch_size` volumes.
        nodes: machines; start the command on each by `torchrun` or `srun`.
        strategy: auto or ddp, each with all weights; or fsdp, each with a share of weights and optimiser state.
    """

    source: str
    out: str
    task: str = "pixcontrast"
    options: dict[str, Any] = field(default_factory=dict)
    backbone: str = "unet"
    width: int = 0
    norm: str = "instance"
    spatial_dims: int = 3
    subjects: str = "auto"
    test_fraction: float = 0.25
    val_fraction: float = 0.1
    split_seed: int = 0
    init: str = "none"
    steps: int = 800
    batch_size: int = 4
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    rank_weight: float = 0.0
    seed: int = 0
    precision: str = "auto"
    accelerator: str = "auto"
    checkpoint_every: int = 200
    stop_on_collapse: bool = False
    probe: int = 0
    probe_every: int = 0
    resume: bool = False
    plan: str = ""
    n4: bool = False
    store: str = ""
    channel: int | None = None
    workers: int = 0
    parts: int = 1
    compile: bool = False
    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"


@dataclass(frozen=True)
class FinetuneConfig:
    """Train a segmentation network with a few labelled subjects.

    Args:
        source: folder of labelled scans, or a manifest written by `medcl scan`.
        out: run folder to write.
        init: run folder of a pretraining to start from, or `none` for random weights.
        labels: labelled subjects to train with, or `all`.
        draw: which seeded draw of that many subjects; draws are nested, the 2-label draw contains the 1-label draw.
        test_fraction: share of labelled subjects held out for test.
        val_fraction: share of labelled subjects held out for validation.
        split_seed: seed of the split into training, validation and test subjects.
        backbone: network; by default that of `init`, or unet.
        width: channels of the network's first level; 0 takes that of `init`, or the backbone's default.
        norm: normalisation layers: instance, layer or batch; by default those of `init`, or instance.
        spatial_dims: 3; or 2 for a network that sees every axial slice by itself; 0 takes that of `init`, or 3.
        steps: optimiser steps.
        batch_size: patches a step.
        lr: peak learning rate.
        pretrained_lr: learning rate of the weights taken from `init`, as a share of `lr`.
        frozen: share of the steps in which the weights taken from `init` stay as they are.
        layer_decay: factor on the learning rate of the weights taken from `init`, once for every stage from the output.
        core_tuning: weight of the contrast of hard pairs of labelled voxels (Core-tuning); 0 for none, 0.1 is usual.
        semi: how to learn from the images of training subjects whose labels are not used: none, mean_teacher,
            self_training or pixel_contrast. The teacher is then what is validated and kept.
        semi_options: options of that method, such as `--semi_options.weight 2`.
        mix: mix the patches of a step: none, mixup or cutmix. With `semi`, CutMix goes between labelled and unlabelled.
        weight_decay: AdamW weight decay.
        warmup: share of the steps over which the learning rate rises linearly.
        augment: strong, or none.
        flip: allow mirrored patches in augmentation; wrong for anatomy that has sides.
        val_every: steps between validations; 0 takes a tenth of the steps.
        seed: seed of the weights, patches and augmentation; every draw makes another one of it.
        precision: auto, 32, bf16 or 16.
        accelerator: auto, cpu or gpu.
        checkpoint_every: steps between checkpoints.
        allow_leakage: go on where validation or test volumes were seen in training; every result is then marked.
        resume: go on from the last checkpoint of `out`.
        plan: a plan.json (or a run folder) to prepare by; by default that of `init` with patches by these scans, or one
            derived from them.
        n4: correct the MRI bias field with N4 first (slow).
        store: folder for prepared volumes, or an fsspec address such as `s3://bucket/store`; by default `$MEDCL_STORE`,
            or `~/.cache/medcl`.
        channel: which channel of 4D files to take.
        workers: processes that read patches while training; 0 reads ahead in a thread.
        parts: in how many parts the rows of a step go through the network, one after another: equal gradient, less
            memory, about a third more time. A step that runs out of memory doubles it by itself.
        compile: compile the network with torch.compile: minutes at the start, for long runs on a GPU.
        devices: GPUs a machine (on a CPU: processes) that train together, each on `batch_size` volumes.
        nodes: machines; start the command on each by `torchrun` or `srun`.
        strategy: auto or ddp: how they do it.
    """

    source: str
    out: str
    init: str = "none"
    labels: str = "all"
    draw: int = 0
    test_fraction: float = 0.25
    val_fraction: float = 0.1
    split_seed: int = 0
    backbone: str = ""
    width: int = 0
    norm: str = ""
    spatial_dims: int = 0
    steps: int = 1200
    batch_size: int = 4
    lr: float = 2e-3
    pretrained_lr: float = 1.0
    frozen: float = 0.0
    layer_decay: float = 1.0
    core_tuning: float = 0.0
    semi: str = "none"
    semi_options: dict[str, Any] = field(default_factory=dict)
    mix: str = "none"
    weight_decay: float = 0.01
    warmup: float = 0.05
    augment: str = "strong"
    flip: bool = False
    val_every: int = 0
    seed: int = 0
    precision: str = "auto"
    accelerator: str = "auto"
    checkpoint_every: int = 200
    allow_leakage: bool = False
    resume: bool = False
    plan: str = ""
    n4: bool = False
    store: str = ""
    channel: int | None = None
    workers: int = 0
    parts: int = 1
    compile: bool = False
    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"


def from_mapping(kind: type[T], values: dict[str, Any], where: str) -> T:
    """Builds a dataclass from a mapping.

    Raises:
        MedclError: a key is unknown (the nearest known one is named) or a required one is missing.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise MedclError(f"unknown key {key!r}", where, nearest(key, known))
    missing = [
        name
        for name, f in known.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise MedclError(f"{', '.join(missing)} missing", where, "Give it on the command line or in the config.")
    # YAML reads `precision: 32` as a number, and the field is text
    text = {k: str(v) for k, v in values.items() if known[k].type == "str" and type(v) in (int, float)}
    return kind(**{**values, **text})


def nearest(key: str, known: Any) -> str:
    """`Did you mean 'x'?`, or the list of what is known."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(sorted(known))}."

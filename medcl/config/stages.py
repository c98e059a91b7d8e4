"""The dataclasses of `medcl scan`, `prepare`, `pretrain` and `finetune`: see `medcl.config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from medcl.config.groups import DataSettings, HardwareSettings, ScheduleSettings, SplitSettings
from medcl.config.kinds import Count, Natural, NonNegative, Positive, Settings, Share, Within

Backbones = Literal["unet", "dynunet", "swin_unetr"]
Norms = Literal["instance", "layer", "batch"]


@dataclass(frozen=True)
class ScanConfig(Settings):
    """What is in a folder of scans.

    Args:
        source: folder to look through, or a table of cases (a .csv file).
        out: where to write the manifest; by default `manifest.json` in the current folder.
        table: a table of cases (CSV: `image`, `label`, `subject`, `session`, `site`, `modality`, `split`); what it says
            is not guessed.
        write_table: where to write what was found as such a table, to mend by hand and give as source.
        include: patterns of files to take alone, such as '*_t1.nii.gz'.
        exclude: patterns of files or folders to leave out, such as derivatives.
        channel: which channel of 4D files to take; 4D files are set aside without it.
        quick: read headers only, no voxels.
        json: print a machine-readable summary instead of the tables.
        yes: take what was guessed where the scan asks; the manifest then counts as confirmed.
        nan: reject sets volumes with NaN or infinite voxels aside, zero takes those voxels as 0.
        workers: processes; 0 takes one a core.
    """

    source: str
    out: str = "manifest.json"
    table: str = ""
    write_table: str = ""
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    channel: int | None = None
    quick: bool = False
    json: bool = False
    yes: bool = False
    nan: Literal["reject", "zero"] = "reject"
    workers: Natural = 0


@dataclass(frozen=True)
class PrepareConfig(DataSettings, Settings):
    """Bring scans to one orientation, spacing and intensity scale, in a store of randomly readable volumes.

    Args:
        source: folder of scans, or a manifest written by `medcl scan`.
        spacing: voxel size in mm to resample to, instead of the derived one.
        workers: processes; 0 takes one a core.
        dask: `local`, or the address of a Dask scheduler whose workers see the same scans and store.
    """

    source: str
    spacing: tuple[Positive, Positive, Positive] | None = None
    workers: Natural = 0
    dask: str = ""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(ScheduleSettings, SplitSettings, DataSettings, HardwareSettings, Settings):
    """Pretrain an encoder on unlabelled scans.

    Args:
        source: folder of scans, or a manifest written by `medcl scan`.
        out: run folder to write.
        task: pretext task: dcl, global_contrast, global_local, local_contrast, mae, pixcontrast, pixpro, simclr or
            voco.
        options: options of the task, such as `--options.momentum 0.99`.
        backbone: network.
        width: channels of the network's first level; 0 takes the backbone's default.
        norm: normalisation layers.
        spatial_dims: 3; or 2 for a network that sees every axial slice by itself, as published slice-wise methods do.
        subjects: `auto` leaves out the validation and test subjects that `finetune` on this folder will use, where
            enough subjects are labelled to hold some out; `all` takes every subject.
        init: run folder whose weights to start from, with its plan; or `none`.
        batch_size: volumes a step, on each device; 0 takes what fits into memory, by measured steps.
        rank_weight: weight of a term that keeps the features from falling into few directions (their coding rate); 0
            trains by the task's own loss alone.
        seed: seed of the weights, crops and augmentation.
        stop_on_collapse: end the run where the loss stands still at a trivial solution, or the features' rank falls.
        probe: labelled training subjects on which frozen features are probed while training; 0 for none. Their labels
            are not trained on.
        probe_every: steps between two probes; 0 takes a tenth of the steps.
    """

    source: str = field(kw_only=False)
    out: str = field(kw_only=False)
    task: str = "pixcontrast"
    options: dict[str, Any] = field(default_factory=dict)
    backbone: Backbones = "unet"
    width: Natural = 0
    norm: Norms = "instance"
    spatial_dims: Literal[3, 2] = 3
    subjects: Literal["auto", "all"] = "auto"
    init: str = "none"
    steps: Count = 800
    batch_size: Natural = 4
    rank_weight: NonNegative = 0.0
    seed: Natural = 0
    stop_on_collapse: bool = False
    probe: Natural = 0
    probe_every: Natural = 0


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(ScheduleSettings, SplitSettings, DataSettings, HardwareSettings, Settings):
    """Train a segmentation network with a few labelled subjects.

    Args:
        source: folder of labelled scans, or a manifest written by `medcl scan`.
        out: run folder to write.
        init: run folder of a pretraining to start from, or `none` for random weights.
        labels: labelled subjects to train with, or `all`.
        draw: which seeded draw of that many subjects; draws are nested, the 2-label draw contains the 1-label draw.
        plan: a plan.json (or a run folder) to prepare by; by default that of `init` with patches by these scans, or one
            derived from them.
        backbone: network; by default that of `init`, or unet.
        width: channels of the network's first level; 0 takes that of `init`, or the backbone's default.
        norm: normalisation layers; by default those of `init`, or instance.
        spatial_dims: 3; or 2 for a network that sees every axial slice by itself; 0 takes that of `init`, or 3.
        batch_size: patches a step.
        pretrained_lr: learning rate of the weights taken from `init`, as a share of `lr`.
        frozen: share of the steps in which the weights taken from `init` stay as they are.
        layer_decay: factor on the learning rate of the weights taken from `init`, once for every stage from the output.
        core_tuning: weight of the contrast of hard pairs of labelled voxels (Core-tuning); 0 for none, 0.1 is usual.
        semi: how to learn from the images of training subjects whose labels are not used. The teacher is then what is
            validated and kept.
        semi_options: options of that method, such as `--semi_options.weight 2`.
        mix: mix the patches of a step. With `semi`, CutMix goes between labelled and unlabelled.
        augment: change patches at random, as nnU-Net does and more often; or not at all.
        flip: allow mirrored patches in augmentation; wrong for anatomy that has sides.
        val_every: steps between validations; 0 takes a tenth of the steps.
        seed: seed of the weights, patches and augmentation; every draw makes another one of it.
        allow_leakage: go on where validation or test volumes were seen in training; every result is then marked.
    """

    source: str = field(kw_only=False)
    out: str = field(kw_only=False)
    init: str = "none"
    labels: str = "all"
    draw: Natural = 0
    plan: str = ""
    backbone: Literal["", "unet", "dynunet", "swin_unetr"] = ""
    width: Natural = 0
    norm: Literal["", "instance", "layer", "batch"] = ""
    spatial_dims: Literal[0, 3, 2] = 0
    steps: Count = 1200
    batch_size: Count = 4
    lr: Positive = 2e-3
    pretrained_lr: Annotated[float, Within(0, 10)] = 1.0
    frozen: Share = 0.0
    layer_decay: Annotated[float, Within(0, 1, above=True)] = 1.0
    core_tuning: NonNegative = 0.0
    semi: Literal["none", "mean_teacher", "self_training", "pixel_contrast"] = "none"
    semi_options: dict[str, Any] = field(default_factory=dict)
    mix: Literal["none", "mixup", "cutmix"] = "none"
    augment: Literal["strong", "none"] = "strong"
    flip: bool = False
    val_every: Natural = 0
    seed: Natural = 0
    allow_leakage: bool = False

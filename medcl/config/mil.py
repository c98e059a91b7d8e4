"""The dataclasses of `medcl mil`: see `medcl.config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from medcl.config.groups import ScheduleSettings
from medcl.config.kinds import (
    Accelerator,
    Count,
    Natural,
    NonNegative,
    Positive,
    Precision,
    Settings,
    Share,
    ShareBelowOne,
    Within,
)

Aggregators = Literal["mean", "max", "abmil", "gated_abmil", "clam_sb", "clam_mb", "dsmil", "transmil"]


@dataclass(frozen=True, kw_only=True)
class TilingSettings:
    """Tiles of slides and images.

    Args:
        mpp: microns per pixel of a tile; 0 takes pixels as they are, as is done for images that say no resolution.
        slide_mpp: microns per pixel of slides that do not say it.
        overlap: share of a tile, or of a cell, that it shares with the next.
        tissue: least share of a tile that must be tissue.
    """

    mpp: NonNegative = 0.5
    slide_mpp: NonNegative = 0.0
    overlap: ShareBelowOne = 0.0
    tissue: Share = 0.25


@dataclass(frozen=True, kw_only=True)
class MILPrepareConfig(TilingSettings, Settings):
    """Extract the features of every bag: slides, images, folders of patches, volumes or feature files.

    Args:
        bags: `bags.csv` with a row a bag: bag_id, path, label, group.
        out: folder to write: `bags.csv`, and one HDF5 file a bag.
        encoder: run folder of `medcl mil pretrain` (patches) or `medcl pretrain` (volumes); resnet18, resnet34 or
            resnet50 with random weights; `timm:NAME`, which downloads it; or `MODULE:FUNCTION`.
        tile: pixels of a tile's side.
        instances: what a volume is a bag of: `sub_volumes`; `slices`, axial; or `cells`, a grid over the whole volume,
            each with the features of every map of the encoder at that place. Slices may also go to a 2D encoder.
        sub_volume: voxels of a sub-volume of the prepared volume, by default half a fine-tuning patch, overlapping by
            half; or of a cell, by default those of the encoder's second map.
        maps: maps of the encoder that a cell gets its features from, the finest first; 0 takes all. Few of them keep
            something small from being drowned by features of what lies around it.
        pool: of what lies in a cell: `mean-max`, which also shows something smaller than a cell; or `mean`.
        seed: of random weights.
        accelerator: what to compute on.
    """

    bags: str = field(kw_only=False)
    out: str = field(kw_only=False)
    encoder: str = "resnet18"
    tile: Annotated[int, Within(16)] = 256
    instances: Literal["sub_volumes", "slices", "cells"] = "sub_volumes"
    sub_volume: tuple[Count, Count, Count] | None = None
    maps: Natural = 0
    pool: Literal["mean-max", "mean"] = "mean-max"
    seed: Natural = 0
    accelerator: Accelerator = "auto"


@dataclass(frozen=True, kw_only=True)
class MILPretrainConfig(ScheduleSettings, TilingSettings, Settings):
    """Pretrain a 2D encoder on the patches of bags, without labels.

    Args:
        bags: `bags.csv`, as for `medcl mil prepare`.
        out: run folder to write.
        method: simclr, or dcl for small batches.
        encoder: network.
        width: factor on its channels.
        tile: pixels of a tile's side.
        most_tiles: tiles held in memory, drawn evenly from the bags.
        batch_size: tiles a step.
        temperature: of the similarities.
        seed: of weights, tiles and views.
        precision: auto takes bf16 where the hardware multiplies in it, else 16 on a GPU and 32 on a CPU.
        accelerator: what to compute on.
        stop_on_collapse: end the run where the loss stands still at a trivial solution.
    """

    bags: str = field(kw_only=False)
    out: str = field(kw_only=False)
    method: Literal["simclr", "dcl"] = "dcl"
    encoder: Literal["resnet18", "resnet34", "resnet50"] = "resnet18"
    width: Positive = 1.0
    tile: Annotated[int, Within(32)] = 96
    most_tiles: Annotated[int, Within(2)] = 20000
    batch_size: Annotated[int, Within(2)] = 64
    weight_decay: NonNegative = 1e-4
    temperature: Positive = 0.1
    seed: Natural = 0
    precision: Precision = "auto"
    accelerator: Accelerator = "auto"
    stop_on_collapse: bool = False


@dataclass(frozen=True)
class MILFitConfig(Settings):
    """Cross-validate and fit a classifier of bags.

    Args:
        bags: `bags.csv` whose paths are feature files, a folder written by `medcl mil prepare`, or a CSV of instances.
        out: run folder to write.
        aggregator: how instances become a bag.
        options: options of the aggregator, such as `--options.hidden 128`.
        method: `plain`; `sc` for supervised contrast over bags (SC-MIL); or `ins` for a classifier of instances trained
            from bag labels (INS), which is an aggregator of its own: `options` are then its options.
        folds: parts of the cross-validation; groups are never divided.
        repeats: cross-validations with other divisions into folds.
        epochs: passes over the training bags.
        batch_size: bags a step.
        lr: peak learning rate.
        weight_decay: AdamW weight decay.
        balance: against unequal classes: weights in the loss, or sampling.
        most_instances: instances drawn at random from a larger bag in every training step; 0 takes all.
        temperature: of the supervised contrast.
        schedule: how its weight falls.
        memory: earlier bags it compares with.
        seed: of weights, order, dropout and folds.
        final: fit one more model on all bags, for `medcl mil predict`.
        accelerator: what to compute on.
        allow_leakage: go on where the encoder has seen bags that are held out; every result is then marked. `false`
            makes it an error.
    """

    bags: str
    out: str
    aggregator: Aggregators = "gated_abmil"
    options: dict[str, Any] = field(default_factory=dict)
    method: Literal["plain", "sc", "ins"] = "plain"
    folds: Annotated[int, Within(2)] = 5
    repeats: Count = 1
    epochs: Count = 40
    batch_size: Count = 8
    lr: Positive = 5e-4
    weight_decay: NonNegative = 0.01
    balance: Literal["none", "weights", "sampling"] = "weights"
    most_instances: Natural = 0
    temperature: Positive = 0.1
    schedule: Literal["linear", "parabolic", "cosine"] = "parabolic"
    memory: Natural = 64
    seed: Natural = 0
    final: bool = True
    accelerator: Accelerator = "auto"
    allow_leakage: bool = True


@dataclass(frozen=True)
class MILPredictConfig(Settings):
    """Class probabilities and attention of bags.

    Args:
        run: run folder of `medcl mil fit`.
        bags: as for `medcl mil fit`; labels are not needed.
        out: folder to write.
        allow_leakage: go on where the encoder or the classifier has seen these bags; every result is then marked.
            `false` makes it an error.
    """

    run: str
    bags: str
    out: str
    allow_leakage: bool = True


@dataclass(frozen=True)
class MILEvaluateConfig(Settings):
    """Scores of class probabilities with intervals over groups.

    Args:
        predictions: run folder of `medcl mil fit`, folder of `medcl mil predict`, or a predictions.csv.
        reference: `bags.csv` with labels and groups, where the predictions hold none.
        out: JSON file to write the scores to.
    """

    predictions: str
    reference: str = ""
    out: str = ""

"""The dataclasses of `medcl mil`: see `medcl.config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class MILFitConfig:
    """Cross-validate and fit a classifier of bags.

    Args:
        bags: `bags.csv` whose paths are feature files, a folder written by `medcl mil prepare`, or a CSV of instances.
        out: run folder to write.
        aggregator: mean, max, abmil, gated_abmil, clam_sb, clam_mb, dsmil or transmil.
        options: options of the aggregator, such as `--options.hidden 128`.
        method: `plain`, or `sc` for supervised contrast over bags (SC-MIL).
        folds: parts of the cross-validation; groups are never divided.
        repeats: cross-validations with other divisions into folds.
        epochs: passes over the training bags.
        batch_size: bags a step.
        lr: peak learning rate.
        weight_decay: AdamW weight decay.
        balance: against unequal classes: `none`, `weights` in the loss, or `sampling`.
        most_instances: instances drawn at random from a larger bag in every training step; 0 takes all.
        temperature: of the supervised contrast.
        schedule: how its weight falls: linear, parabolic or cosine.
        memory: earlier bags it compares with.
        seed: of weights, order, dropout and folds.
        final: fit one more model on all bags, for `medcl mil predict`.
        accelerator: auto, cpu or gpu.
    """

    bags: str
    out: str
    aggregator: str = "gated_abmil"
    options: dict[str, Any] = field(default_factory=dict)
    method: str = "plain"
    folds: int = 5
    repeats: int = 1
    epochs: int = 40
    batch_size: int = 8
    lr: float = 5e-4
    weight_decay: float = 0.01
    balance: str = "weights"
    most_instances: int = 0
    temperature: float = 0.1
    schedule: str = "parabolic"
    memory: int = 64
    seed: int = 0
    final: bool = True
    accelerator: str = "auto"


@dataclass(frozen=True)
class MILPredictConfig:
    """Class probabilities and attention of bags.

    Args:
        run: run folder of `medcl mil fit`.
        bags: as for `medcl mil fit`; labels are not needed.
        out: folder to write.
    """

    run: str
    bags: str
    out: str


@dataclass(frozen=True)
class MILEvaluateConfig:
    """Scores of class probabilities with intervals over groups.

    Args:
        predictions: run folder of `medcl mil fit`, folder of `medcl mil predict`, or a predictions.csv.
        reference: `bags.csv` with labels and groups, where the predictions hold none.
        out: JSON file to write the scores to.
    """

    predictions: str
    reference: str = ""
    out: str = ""

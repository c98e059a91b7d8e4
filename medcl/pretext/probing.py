"""Following a pretraining run by what simple readers make of its frozen features on a few labelled cases."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from medcl.dataset.case import Manifest
from medcl.dataset.splits import Split
from medcl.errors import MedclError
from medcl.evaluation.probe import ProbeData, probe, probe_data
from medcl.networks.backbones import Backbone
from medcl.runtime.run import log
from medcl.store.plan import Plan, round_up
from medcl.store.prepare import Stored

LEAST = 2  # subjects: each is predicted from the others


class Probe(pl.Callback):
    """Logs the scores of `medcl.evaluation.probe` every so many steps, before the first and after the last.

    Labels are looked at and never trained on.

    Args:
        backbone: whose features are probed.
        data: labelled patches.
        every: steps between two probes.
        steps: of the run.
    """

    def __init__(self, backbone: Backbone, data: ProbeData, every: int, steps: int):
        self.backbone, self.data, self.every, self.steps = backbone, data, every, steps

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self._score(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step % self.every == 0 or trainer.global_step == self.steps:
            self._score(trainer, module)

    def _score(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        scores = probe(self.backbone, self.data, module.device)
        trainer.logger.log_metrics(scores, max(0, trainer.global_step - 1))  # type: ignore[union-attr]
        shown = ", ".join(
            f"{name.removeprefix('probe_').replace('_', ' ')} {value:.3f}" for name, value in scores.items()
        )
        log.info("Probe after %d steps: %s.", trainer.global_step, shown)


def subjects_to_probe(split: Split | None, manifest: Manifest, count: int) -> tuple[str, ...]:
    """Labelled training subjects; never one that is validated or tested on.

    Raises:
        MedclError: too few of them, or too few asked for.
    """
    if count < LEAST:
        raise MedclError(f"{count} subjects cannot tell one another", "--probe", f"Give at least {LEAST}, or 0.")
    labelled = {case.subject for case in manifest.labelled}
    able = [subject for subject in (split.train if split else manifest.subjects) if subject in labelled]
    if len(able) < count:
        raise MedclError(
            f"wants {count} labelled training subjects, and there are {len(able)}", "--probe", "Give fewer, or 0."
        )
    return tuple(able[:count])


def probe_for(backbone: Backbone, stored: list[Stored], plan: Plan, every: int, steps: int, seed: int) -> Probe:
    """The callback over prepared labelled volumes."""
    size = round_up([min(p, v) for p, v in zip(plan.patch_size, plan.volume_size, strict=True)], backbone.multiple)
    values = sorted(plan.labels)
    return Probe(
        backbone, probe_data([(item.case.subject, item.path) for item in stored], values, size, seed), every, steps
    )

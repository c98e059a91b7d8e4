"""What every training stage does before it trains and after, written once: a stage opens a `Study` and passes it on.

In the order in which things happen: the machine is chosen, the source is read, subjects are split, a plan is made; then
the run folder is opened, volumes are prepared, and what the run was given is written into it, its manifest last. Where
the run goes on, or another process leads, all of this is read from the run folder instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytorch_lightning as pl

from medcl.config import FinetuneConfig, PretrainConfig
from medcl.dataset.case import Case, Manifest
from medcl.dataset.splits import Split, previous_split
from medcl.leakage.seen import Seen, save_seen
from medcl.runtime.files import write_json
from medcl.runtime.memory import keep_memory
from medcl.runtime.precision import choose_precision, keep_precision
from medcl.runtime.run import log, open_run, previous_run, write_provenance
from medcl.runtime.scale import await_leader, check_scale, is_follower
from medcl.runtime.training import choose_accelerator, fit, hours, resume_step, trainer_for
from medcl.store.plan import Plan
from medcl.store.prepare import Stored
from medcl.store.stage import confirm, describe, load_source, log_problems, prepare_all

C = TypeVar("C", PretrainConfig, FinetuneConfig)
S = TypeVar("S", bound=Split | None)


class Study(Generic[C]):
    """A training from its config to its run folder.

    Attributes:
        config: of the stage.
        stage: `pretrain` or `finetune`.
        is_follower: whether another process reads the source and writes the run folder.
        accelerator: `cpu` or `gpu`.
        precision: Lightning's name of it.
        previous_run: the run folder where this study goes on from it; None where it begins one.
        manifest: cases of the source; of a run that goes on, those that it began with.
        run: the run folder, once `begin` was called.
        first_step: optimiser steps that are already done.

    Raises:
        MedclError: the machine cannot do what is asked, or the source cannot be read.
    """

    def __init__(self, config: C, stage: str):
        self._began = time.monotonic()
        self.config: C = config
        self.stage = stage
        keep_memory()
        self.accelerator = choose_accelerator(config.accelerator)
        check_scale(config, self.accelerator)
        self.is_follower = is_follower(config)
        leader = await_leader(config)
        known = config.out if config.resume or self.is_follower else ""
        self.precision = choose_precision(config.precision, self.accelerator, known)
        self.previous_run = leader or previous_run(config)
        manifest = load_source(config.source, config.channel, self.previous_run)
        self.manifest = confirm(manifest, config.source, config.yes)
        self.run, self.first_step = Path(config.out), 0

    def split(self, new: Callable[[], Split]) -> Split:
        """The split that the run began with, or a new one."""
        return previous_split(self.previous_run) or new()

    def plan(self, new: Callable[[], Plan]) -> Plan:
        """The plan that the run began with, or a new one."""
        return Plan.load(self.previous_run) if self.previous_run else new()

    def begin(self) -> None:
        """Opens the run folder, to which the log goes from now on, and says what the source holds.

        Raises:
            MedclError: the folder holds another run.
        """
        self.run = open_run(self.config.out, self.config, self.stage, self.config.resume)
        if not self.is_follower:
            keep_precision(self.run, self.precision, self.accelerator)
        self.first_step = resume_step(self.run) if self.config.resume else 0
        log.info("%s: %s.", self.config.source, describe(self.manifest))
        log_problems(self.manifest)

    def prepare(self, plan: Plan, cases: tuple[Case, ...]) -> tuple[list[Stored], Manifest]:
        """Prepared volumes of these cases, and the manifest with what was set aside."""
        return prepare_all(self.manifest, plan, self.config.store, cases=cases)

    def write(
        self, plan: Plan, split: Split | None, manifest: Manifest, files: Mapping[str, Any], seen: Seen | None = None
    ) -> None:
        """Writes what the run was given; nothing where another process leads.

        Args:
            plan, split: of the run.
            manifest: written last, for it says that the rest is there.
            files: further JSON files by name.
            seen: what the weights will have seen.
        """
        if self.is_follower:
            return
        plan.save(self.run / "plan.json")
        if split:
            split.save(self.run / "split.json")
        for name, content in files.items():
            write_json(self.run / name, content)
        if seen is not None:
            save_seen(self.run, seen)
        manifest.save(self.run / "manifest.json")

    def abandon(self) -> None:
        """Frees the run folder again where nothing was trained, so that the same `out` may be used."""
        if not (self.config.resume or self.is_follower):
            (self.run / "config.yaml").unlink()

    def trainer(self, title: str, seed: int, *callbacks: pl.Callback) -> pl.Trainer:
        """Lightning's trainer for the rest of the run's steps."""
        return trainer_for(
            self.run, steps=self.config.steps, accelerator=self.accelerator, precision=self.precision, seed=seed,
            every=self.config.checkpoint_every, title=title, resume_step=self.first_step, callbacks=callbacks,
            scale=self.config,
        )  # fmt: skip

    def fit(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Trains the module, from the last checkpoint where the run goes on; see `medcl.runtime.training.fit`."""
        fit(trainer, module, self.run if self.first_step else None)

    def end(self, what: str, **facts: Any) -> Path:
        """Writes the run's provenance and says where its weights are."""
        if not self.is_follower:
            write_provenance(
                self.run, self._began, accelerator=self.accelerator, precision=self.precision, seed=self.config.seed,
                resumed_at=self.first_step, **facts,
            )  # fmt: skip
            log.info("%s in %s after %s.", what, self.run / "weights", hours(time.monotonic() - self._began))
        return self.run

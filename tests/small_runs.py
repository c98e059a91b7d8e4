"""Runs that take seconds, and how to kill one."""

from __future__ import annotations

from medcl import FinetuneConfig, PretrainConfig

SMALL = {"hidden": 16, "embedding": 8, "crops": 2}


def pretraining(source, out, **more) -> PretrainConfig:
    return PretrainConfig(
        str(source), str(out), **{"task": "voco", "steps": 6, "batch_size": 2, "width": 4, "options": SMALL, **more}
    )


def finetuning(source, out, **more) -> FinetuneConfig:
    return FinetuneConfig(str(source), str(out), **{"steps": 4, "batch_size": 2, "labels": "2", "val_every": 2, **more})


class Killed(Exception):
    pass


def kill_at(monkeypatch, step: int):
    """Makes training die in the middle of a step, as a kill would."""
    from medcl.runtime.training import SeedEveryStep

    original = SeedEveryStep.on_train_batch_start

    def start(self, trainer, module, *args):
        original(self, trainer, module, *args)
        if trainer.global_step == step:
            raise Killed

    monkeypatch.setattr(SeedEveryStep, "on_train_batch_start", start)

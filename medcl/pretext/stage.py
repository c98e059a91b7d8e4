"""The stage `pretrain`: SOURCE to a pretrained encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from medcl.checkpoint import Contract, load_weights, save_weights, transfer
from medcl.config import PretrainConfig
from medcl.dataset.case import Manifest
from medcl.dataset.splits import Split, cases_of, make_split, previous_split
from medcl.errors import MedclError
from medcl.leakage.seen import Seen, save_seen, seen_by, seen_in
from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.networks.parts import check_parts, compile_network
from medcl.networks.sharding import whole
from medcl.pretext.base import PretextTask
from medcl.pretext.module import PretextModule, fitted, timed_step
from medcl.pretext.probing import probe_for, subjects_to_probe
from medcl.pretext.registry import task_class
from medcl.pretext.watch import Watch
from medcl.runtime.files import read_json
from medcl.runtime.run import log, read_config, write_config
from medcl.runtime.trained import Record
from medcl.runtime.training import hours, peak_memory
from medcl.store.crops import Partitions, ReadDataset
from medcl.store.plan import Plan
from medcl.store.prepare import Stored
from medcl.store.signature import subject_hash
from medcl.store.stage import plan_for, tell_growth, with_nan
from medcl.store.volumes import read_meta
from medcl.study import Study

OPTIONS = "options.json"  # of the task, every default filled in


def pretrain(config: PretrainConfig) -> Path:
    """Pretrains an encoder.

    Args:
        config: see `PretrainConfig`.

    Returns:
        The run folder.

    Raises:
        MedclError: a setting cannot work; raised before any training.
    """
    check(config)
    kind = task_class(config.task)
    study = Study(config, "pretrain")
    config = study.config = with_batch_of(study)
    pretrained = None if config.init == "none" else load_weights(config.init)
    subjects, split = subjects_of(study)
    plan = study.plan(lambda: new_plan(study, pretrained[0] if pretrained else None))
    pl.seed_everything(config.seed, verbose=False)
    spec = BackboneSpec(config.backbone, 1, max(2, len(plan.labels) + 1), plan.strides, config.width, config.norm,
                        config.spatial_dims)  # fmt: skip
    backbone = build_backbone(spec)
    taken = transfer(*pretrained, backbone, config.init) if pretrained else None
    before = seen_by(config.init) if pretrained else Seen()
    options = options_of(config, kind, study.previous_run)
    task = kind(backbone, plan, options)
    check_task(task, len(subjects), config)
    probed = subjects_to_probe(split, study.manifest, config.probe) if config.probe else ()

    study.begin()
    stored, manifest = study.prepare(plan, cases_of(study.manifest, subjects))
    if config.batch_size == 0:
        paths = [item.path for item in stored]
        task, plan, config = fitted(config, kind, options, spec, plan, pretrained, paths, study.accelerator,
                                    study.precision)  # fmt: skip
        study.config = config
        write_config(study.run, "pretrain", config)
    study.write(plan, split, manifest, {OPTIONS: task.resolved()})
    log_subjects(stored, split)
    if taken:
        log.info("%s: %s.", config.init, taken)
    task.check(len({item.case.subject for item in stored}), config.batch_size)
    log_small_volumes(stored, task)
    dataset = ReadDataset([item.path for item in stored], task.read_size, config.seed, task.places)
    module = PretextModule(task, dataset, config)
    record = Record(task.backbone, taken.taken if taken else None)
    task.backbone.parts = max(config.parts, task.backbone.parts)
    if config.compile:
        compile_network(task.backbone)
    log_duration(study, module)
    watch = Watch(task, config.steps, config.stop_on_collapse)
    probes = probes_of(study, task, plan, probed) if config.probe else ()
    trainer = study.trainer(f"pretrain {config.task}", config.seed, watch, *probes)
    study.fit(trainer, module)
    if summary := watch.summary():
        log.info(summary)
    kept = whole(task.backbone)
    trained = record.trained(task.backbone, trainer.optimizers, kept)
    if not study.is_follower:
        cases = [item.case for item in stored]
        save_seen(study.run, before + seen_in(study.manifest, cases, "pretraining", study.run, config.store))
        save_weights(study.run, kept, contract_of(task, config, plan, spec, stored).with_trained(trained, kept))
    return study.end("Encoder")


def with_batch_of(study: Study[PretrainConfig]) -> PretrainConfig:
    """The config, with the batch that a run which goes on has chosen."""
    if study.previous_run and study.config.batch_size == 0:
        return replace(study.config, batch_size=read_config(study.previous_run)["batch_size"])
    return study.config


def subjects_of(study: Study[PretrainConfig]) -> tuple[tuple[str, ...], Split | None]:
    """Who pretrains, and the split that leaves others out; of a run that goes on, what it holds."""
    if study.previous_run:
        return study.manifest.subjects, previous_split(study.previous_run)
    return choose_subjects(study.manifest, study.config)


def new_plan(study: Study[PretrainConfig], contract: Contract | None) -> Plan:
    """The plan by these scans; with pretrained weights theirs, for volumes of this size."""
    config = study.config
    plan = plan_for(study.manifest, config.plan, device=study.accelerator, n4=config.n4, store=config.store,
                    nan=config.nan)  # fmt: skip
    if config.spatial_dims == 2:
        plan = plan.slicewise()
    if contract is None:
        return plan
    tell_growth(study.manifest, contract.plan, config.init)
    return with_nan(replace(contract.plan, volume_size=plan.volume_size, labels=plan.labels), config.nan)


def options_of(config: PretrainConfig, kind: type[PretextTask], previous_run: Path | None) -> dict[str, Any]:
    """Options of the task; those of a run that goes on with the defaults that it began with."""
    given = config.options
    if previous_run is None:
        return given
    if (previous_run / OPTIONS).exists():
        return dict(read_json(previous_run / OPTIONS))
    nested = {name: {**value, **given.get(name, {})} for name, value in kind.before.items() if isinstance(value, dict)}
    return {**kind.before, **given, **nested}


def check_task(task: PretextTask, subjects: int, config: PretrainConfig) -> None:
    """Refuses before anything is written; volumes that turn out to be unreadable are counted out later."""
    task.check(subjects, config.batch_size or 1 << 30)
    if "encoder" not in task.trains and config.init == "none":
        raise MedclError("the encoder would stay as frozen as it was drawn, at random weights", "--init",
                         "Give --init RUN, or --options.freeze_encoder false.")  # fmt: skip


def probes_of(study: Study[PretrainConfig], task: PretextTask, plan: Plan, subjects: tuple[str, ...]) -> tuple[Any]:
    """The callback that probes frozen features on labelled training subjects."""
    config = study.config
    labelled, _ = study.prepare(plan, cases_of(study.manifest, subjects, labelled=True))
    every = config.probe_every or max(1, config.steps // 10)
    return (probe_for(task.backbone, labelled, plan, every, config.steps, config.seed),)


def check(config: PretrainConfig) -> None:
    """Refuses settings that cannot work together, before anything is read."""
    if config.batch_size == 0 and config.devices * config.nodes > 1:
        raise MedclError("is found on one device only", "--batch_size 0", "Give at least 1.")
    check_parts(config.parts, config.norm)
    if config.compile and config.strategy == "fsdp":
        raise MedclError("a compiled network cannot be divided", "--compile", "Leave it out, or use --strategy ddp.")


def log_subjects(stored: list[Stored], split: Split | None) -> None:
    """Logs how many subjects pretrain, and how many are left out."""
    if split:
        log.info("%d subjects pretrain; %d of validation and %d of test are left out (--subjects all takes them).",
                 len({item.case.subject for item in stored}), len(split.val), len(split.test))  # fmt: skip


def log_duration(study: Study[PretrainConfig], module: PretextModule) -> None:
    """Says what is trained, and measures how long it will take."""
    config, task = study.config, module.task
    size = sum(p.numel() for p in task.backbone.encoder_parameters()) / 1e6
    log.info("%s on %s (encoder of %.1f M parameters), %s, %s: %s.",
             config.task, config.backbone, size, study.accelerator, study.precision, task.describe())  # fmt: skip
    seconds, left = timed_step(module, study.accelerator, study.precision), config.steps - study.first_step
    log.info("About %s for %d steps at %.2f s each; peak memory %.1f GiB.",
             hours(seconds * left), left, seconds, peak_memory(study.accelerator))  # fmt: skip


def log_small_volumes(stored: list[Stored], task: PretextTask) -> None:
    """Says how many volumes a read does not fit into: what is missing repeats their edge."""
    shapes = [read_meta(item.path)["shape"] for item in stored]
    small = sum(any(n < r for n, r in zip(shape, task.read_size, strict=True)) for shape in shapes)
    if small:
        size = " x ".join(map(str, task.read_size))
        log.info("%d of %d volumes are smaller than a read of %s voxels; there their edge is repeated.",
                 small, len(stored), size)  # fmt: skip
    if isinstance(task.places, Partitions):
        grid = task.places.grid
        thin = sum(not task.places.distinct(shape, task.read_size) for shape in shapes)
        if thin:
            shape = " x ".join(map(str, grid))
            log.warning("%d of %d volumes are so small that several of their %s partitions show the same: leave them "
                        "out, or give a smaller --options.size.", thin, len(stored), shape)  # fmt: skip


def choose_subjects(manifest: Manifest, config: PretrainConfig) -> tuple[tuple[str, ...], Split | None]:
    """Who pretrains: by default nobody whom `finetune` on the same folder would validate or test on."""
    split = make_split(manifest, config.test_fraction, config.val_fraction, config.split_seed)
    if config.subjects == "all" or not (split.val or split.test):
        return manifest.subjects, None
    return split.train, split


def contract_of(
    task: PretextTask, config: PretrainConfig, plan: Plan, spec: BackboneSpec, stored: list[Stored]
) -> Contract:
    """The contract of the weights, without the tensors that were trained."""
    return Contract(
        kind="pretrained",
        backbone=spec,
        plan=plan,
        trained=(),  # added when weights are saved
        task=config.task,
        options=task.resolved(),
        source=str(Path(config.source).resolve()),
        volumes=tuple(sorted(read_meta(item.path)["voxel_hash"] for item in stored)),
        subjects=tuple(sorted({subject_hash(item.case.subject) for item in stored})),
        step=config.steps,
    )

"""The stage `pretrain`: SOURCE to a pretrained encoder."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from medcl.checkpoint import Contract, load_weights, save_weights, transfer
from medcl.config import PretrainConfig
from medcl.data.case import Manifest
from medcl.data.crops import Partitions, ReadDataset, StepBatches, crop_loader, join_reads
from medcl.data.plan import Plan
from medcl.data.prepare import Stored
from medcl.data.signature import subject_hash
from medcl.data.splits import Split, begun_split, cases_of, make_split
from medcl.data.stage import describe, load_source, plan_for, prepare_all, tell_problems
from medcl.data.store import read_meta
from medcl.errors import MedclError
from medcl.files import read_json, write_json
from medcl.memory import RetrySmaller, keep_memory, make_room, out_of_memory
from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.networks.parts import check_parts, compile_network
from medcl.networks.sharding import is_sharded, shard, whole
from medcl.optimizer import adamw
from medcl.precision import autocast, choose_precision, keep_precision
from medcl.pretext.base import PretextTask
from medcl.pretext.fitting import fit_to_memory
from medcl.pretext.probing import probe_for, subjects_to_probe
from medcl.pretext.registry import task_class
from medcl.pretext.watch import Watch
from medcl.run import begun_run, log, open_run, read_config, write_config, write_provenance
from medcl.scale import await_leader, check_scale, local_rank
from medcl.seen import Seen, save_seen, seen_by, seen_in
from medcl.trained import Record
from medcl.training import choose_accelerator, fit, hours, peak_memory, preserved, resume_step, trainer_for

TIMED_STEPS = 3
OPTIONS = "options.json"  # of the task, every default filled in
UNSEEN = 2**40  # a read of this number or above is of no training step


def without_gradient(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


class PretextModule(RetrySmaller):
    """Lightning's view of a pretext task."""

    def __init__(self, task: PretextTask, dataset: ReadDataset, config: PretrainConfig):
        super().__init__()
        self.task, self.dataset, self.config = task, dataset, config
        self.seen: dict[str, dict[str, Tensor]] = {}  # of the last step, for diagnostics

    def train_dataloader(self) -> Any:
        batches = StepBatches(
            self.config.batch_size,
            self.trainer.global_step,
            self.config.steps,
            self.global_rank,
            self.trainer.world_size,
        )
        return crop_loader(self.dataset, batches, self.config.workers, pin=self.device.type == "cuda")

    def transfer_batch_to_device(self, batch: dict[str, Tensor], device: torch.device, index: int) -> dict[str, Tensor]:
        # these stay on the CPU: augmentation draws its parameters there, and which reads stick out is decided there
        here = ("seed", "start", "extent")
        return {k: v if k in here else v.to(device, non_blocking=True) for k, v in batch.items()}

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            views = self.task.views(batch)
        z, marks = self.task.joined(views)
        self.seen = {"views": views, "z": without_gradient(z), "marks": without_gradient(marks)}
        losses = self.task.objective(z, marks)
        if self.config.rank_weight:
            losses["unused_rate"] = self.task.unused_rate(marks)
        return losses

    def cost(self, losses: dict[str, Tensor]) -> Tensor:
        """What is minimised: the task's loss, and the term that keeps the features' rank."""
        return losses["loss"] + self.config.rank_weight * losses.get("unused_rate", 0.0)

    def rows_of(self, number: int) -> dict[str, Tensor]:
        """Marks of one step's reads that training does not draw, as the task stands: for diagnostics."""
        first = UNSEEN + number * self.config.batch_size
        batch = join_reads([self.dataset[first + i] for i in range(self.config.batch_size)])
        with torch.no_grad():
            batch = self.transfer_batch_to_device(batch, self.device, 0)
            with torch.autocast(self.device.type, enabled=False):
                views = self.task.views(batch)
            return self.task.embed(views)[1]

    def training_step(self, batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        losses = self.losses(batch)
        loss = losses["loss"].detach()
        rate = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        self.log_dict({**{k: v.detach() for k, v in losses.items()}, "lr": rate}, batch_size=len(batch["image"]))
        return {"loss": self.cost(losses), "objective": loss}

    def trial(self, volumes: int, accelerator: str, precision: str) -> None:
        """Forward and backward pass of the first `volumes` samples; gradients stay."""
        device = torch.device("cuda", local_rank()) if accelerator == "gpu" else torch.device("cpu")
        self.to(device)
        batch = join_reads([self.dataset[number] for number in range(volumes)])
        with autocast(precision, accelerator):
            losses = self.losses(self.transfer_batch_to_device(batch, device, 0))
        self.cost(losses).backward()
        if accelerator == "gpu":
            torch.cuda.synchronize()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # here and not in `on_train_batch_end`, which runs after the callbacks: a checkpoint must hold the new teacher
        self.task.after_step((self.trainer.global_step + 1) / self.config.steps)

    def configure_model(self) -> None:
        """Where Lightning's strategy divides a network: see `medcl.networks.sharding`."""
        if self.config.strategy == "fsdp" and not is_sharded(self):
            shard(self, self.device_mesh["data_parallel"])  # type: ignore[index]
            self.strict_loading = False  # a part that no step has touched has no optimiser state to go on from

    def configure_optimizers(self) -> Any:
        config = self.config
        return adamw(self.task, config.lr, config.weight_decay, config.steps, config.warmup)


def pretrain(config: PretrainConfig) -> Path:
    """Pretrains an encoder.

    Args:
        config: see `PretrainConfig`.

    Returns:
        The run folder.

    Raises:
        MedclError: a setting cannot work; told before any training.
    """
    began = time.monotonic()
    check(config)
    keep_memory()
    accelerator = choose_accelerator(config.accelerator)
    check_scale(config, accelerator)
    led = await_leader(config)  # what another process has prepared
    precision = choose_precision(config.precision, accelerator, config.out if config.resume or led else "")
    kind = task_class(config.task)
    pretrained = None if config.init == "none" else load_weights(config.init)
    begun = led or begun_run(config)
    if begun and config.batch_size == 0:
        config = replace(config, batch_size=read_config(begun)["batch_size"])
    manifest = load_source(config.source, config.channel, begun)
    if begun:
        # what the run holds, not what the source would give by now
        plan, split, subjects = Plan.load(begun), begun_split(begun), manifest.subjects
    else:
        subjects, split = choose_subjects(manifest, config)
        plan = plan_for(manifest, config.plan, device=accelerator, n4=config.n4, store=config.store)
        if config.spatial_dims == 2:
            plan = plan.slicewise()
        if pretrained:
            plan = replace(pretrained[0].plan, volume_size=plan.volume_size, labels=plan.labels)
    pl.seed_everything(config.seed, verbose=False)
    classes = max(2, len(plan.labels) + 1)
    spec = BackboneSpec(
        config.backbone, 1, classes, plan.strides, config.width, config.norm, config.spatial_dims
    )  # fmt: skip
    backbone = build_backbone(spec)
    taken = transfer(*pretrained, backbone, config.init) if pretrained else None
    before = seen_by(config.init) if pretrained else Seen()
    options = begun_options(config, kind, begun)
    task = kind(backbone, plan, options)
    # before anything is written; volumes that turn out to be unreadable are counted out below
    task.check(len(subjects), config.batch_size or 1 << 30)
    if "encoder" not in task.trains and not pretrained:
        raise MedclError("the encoder would stay as frozen as it was drawn, at random weights", "--init",
                         "Give --init RUN, or --options.freeze_encoder false.")  # fmt: skip
    probed = subjects_to_probe(split, manifest, config.probe) if config.probe else ()

    run = open_run(config.out, config, "pretrain", config.resume)
    if not led:
        keep_precision(run, precision, accelerator)
    first = resume_step(run) if config.resume else 0
    log.info("%s: %s.", config.source, describe(manifest))
    tell_problems(manifest)
    stored, left = prepare_all(manifest, plan, config.store, cases=cases_of(manifest, subjects))
    if config.batch_size == 0:
        task, plan, config = fitted(config, kind, options, spec, plan, pretrained, [item.path for item in stored],
                                    accelerator, precision)  # fmt: skip
        write_config(run, "pretrain", config)
    if not led:
        plan.save(run / "plan.json")
        write_json(run / OPTIONS, task.resolved())
        if split:
            split.save(run / "split.json")
        left.save(run / "manifest.json")
    if split:
        log.info("%d subjects pretrain; %d of validation and %d of test are left out (--subjects all takes them).",
                 len({item.case.subject for item in stored}), len(split.val), len(split.test))  # fmt: skip

    if taken:
        log.info("%s: %s.", config.init, taken)
    task.check(len({item.case.subject for item in stored}), config.batch_size)
    tell_small_volumes(stored, task)
    dataset = ReadDataset([item.path for item in stored], task.read_size, config.seed, task.places)
    module = PretextModule(task, dataset, config)
    record = Record(task.backbone, taken.taken if taken else None)
    task.backbone.parts = max(config.parts, task.backbone.parts)
    if config.compile:
        compile_network(task.backbone)
    size = sum(p.numel() for p in task.backbone.encoder_parameters()) / 1e6
    log.info("%s on %s (encoder of %.1f M parameters), %s, %s: %s.",
             config.task, config.backbone, size, accelerator, precision, task.describe())  # fmt: skip
    seconds = timed_step(module, accelerator, precision)
    left_over = config.steps - first
    log.info(
        "About %s for %d steps at %.2f s each; peak memory %.1f GiB.",
        hours(seconds * left_over), left_over, seconds, peak_memory(accelerator),
    )  # fmt: skip
    watch = Watch(task, config.steps, config.stop_on_collapse)
    callbacks: tuple[pl.Callback, ...] = (watch,)
    if config.probe:
        told = cases_of(manifest, probed, labelled=True)
        labelled, _ = prepare_all(manifest, plan, config.store, cases=told)
        every = config.probe_every or max(1, config.steps // 10)
        callbacks += (probe_for(task.backbone, labelled, plan, every, config.steps, config.seed),)
    trainer = trainer_for(
        run, steps=config.steps, accelerator=accelerator, precision=precision, seed=config.seed,
        every=config.checkpoint_every, title=f"pretrain {config.task}", resume_step=first, callbacks=callbacks,
        scale=config,
    )  # fmt: skip
    fit(trainer, module, run if first else None)
    if summary := watch.summary():
        log.info(summary)
    kept = whole(task.backbone)
    trained = record.trained(task.backbone, trainer.optimizers, kept)
    if led:
        return run
    save_seen(run, before + seen_in(manifest, [item.case for item in stored], "pretraining", run, config.store))
    save_weights(run, kept, contract_of(task, config, plan, spec, stored).with_trained(trained, kept))
    write_provenance(run, began, accelerator=accelerator, precision=precision, seed=config.seed, resumed_at=first)
    log.info("Encoder in %s after %s.", run / "weights", hours(time.monotonic() - began))
    return run


def begun_options(config: PretrainConfig, kind: type[PretextTask], begun: Path | None) -> dict[str, Any]:
    """Options of the task; those of a run that goes on with the defaults that it began with."""
    if begun is None:
        return config.options
    if (begun / OPTIONS).exists():
        return dict(read_json(begun / OPTIONS))
    nested = {name: {**value, **config.options.get(name, {})} for name, value in kind.before.items()
              if isinstance(value, dict)}  # fmt: skip
    return {**kind.before, **config.options, **nested}


def check(config: PretrainConfig) -> None:
    """Refuses settings that cannot work, before anything is read."""
    for name in ("steps", "checkpoint_every", "parts"):
        if getattr(config, name) < 1:
            raise MedclError(f"{getattr(config, name)} is not positive", f"--{name}", "Give at least 1.")
    if not 0 <= config.rank_weight < math.inf:
        raise MedclError(f"{config.rank_weight} is no weight", "--rank_weight", "Give 0 or more.")
    if config.batch_size < 0 or (config.batch_size == 0 and config.devices * config.nodes > 1):
        raise MedclError(f"{config.batch_size} volumes a step", "--batch_size", "Give at least 1 (0 on one device).")
    check_parts(config.parts, config.norm)
    if config.compile and config.strategy == "fsdp":
        raise MedclError("a compiled network cannot be divided", "--compile", "Leave it out, or use --strategy ddp.")
    if config.lr <= 0:
        raise MedclError(f"{config.lr} is not positive", "--lr", "Give a positive number.")
    if config.width < 0 or config.weight_decay < 0:
        raise MedclError("negative", "--width or --weight_decay", "Give 0 or more.")
    if not 0 <= config.warmup < 1:
        raise MedclError(f"{config.warmup} is no share of the steps", "--warmup", "Give 0 or more, below 1.")
    if config.subjects not in ("auto", "all"):
        raise MedclError(f"unknown subjects {config.subjects!r}", "--subjects", "Use auto or all.")
    if min(config.seed, config.workers, config.probe, config.probe_every) < 0:
        raise MedclError("negative", "--seed, --workers, --probe or --probe_every", "Give 0 or more.")


def tell_small_volumes(stored: list[Stored], task: PretextTask) -> None:
    """Says how many volumes a read does not fit into: what is missing repeats their edge."""
    shapes = [read_meta(item.path)["shape"] for item in stored]
    small = sum(any(n < r for n, r in zip(shape, task.read_size, strict=True)) for shape in shapes)
    if small:
        size = " x ".join(map(str, task.read_size))
        log.info("%d of %d volumes are smaller than a read of %s voxels; there their edge is repeated.",
                 small, len(stored), size)  # fmt: skip
    if isinstance(task.places, Partitions):
        grid = task.places.grid
        thin = sum(not task.places.apart(shape, task.read_size) for shape in shapes)
        if thin:
            told = " x ".join(map(str, grid))
            log.warning("%d of %d volumes are so small that several of their %s partitions show the same: leave them "
                        "out, or give a smaller --options.size.", thin, len(stored), told)  # fmt: skip


def fitted(
    config: PretrainConfig, kind: Any, options: dict[str, Any], spec: BackboneSpec, plan: Plan, pretrained: Any,
    paths: list[Path], accelerator: str, precision: str,
) -> tuple[PretextTask, Plan, PretrainConfig]:  # fmt: skip
    """The task, plan and config of the largest batch that fits into memory."""

    class Trial(PretextModule):
        def trial(self, volumes: int, accelerator: str, precision: str = precision) -> None:
            with preserved(self):
                super().trial(volumes, accelerator, precision)

    def build(plan: Plan) -> PretextModule:
        torch.manual_seed(config.seed)  # the weights of a run do not depend on how often it was measured
        backbone = build_backbone(replace(spec, strides=plan.strides))
        if pretrained:
            contract, state = pretrained
            transfer(contract, state, backbone, config.init)
        task = kind(backbone, plan, options)
        backbone.parts = config.parts
        return Trial(task, ReadDataset(paths, task.read_size, config.seed, task.places), config)

    module, plan, batch = fit_to_memory(build, plan, len(paths), accelerator)
    return module.task, plan, replace(config, batch_size=batch, parts=module.task.backbone.parts)


def choose_subjects(manifest: Manifest, config: PretrainConfig) -> tuple[tuple[str, ...], Split | None]:
    """Who pretrains: by default nobody whom `finetune` on the same folder would validate or test on."""
    split = make_split(manifest, config.test_fraction, config.val_fraction, config.split_seed)
    if config.subjects == "all" or not (split.val or split.test):
        return manifest.subjects, None
    return split.train, split


def timed_step(module: PretextModule, accelerator: str, precision: str) -> float:
    """Seconds of one training step: the last of a few trial ones, which leave no trace."""
    spent = 0.0
    with preserved(module):
        left = TIMED_STEPS
        while left:
            began = time.perf_counter()
            try:
                module.trial(module.config.batch_size, accelerator, precision)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                make_room(module.task.backbone, "A trial step", error)
                continue
            spent, left = time.perf_counter() - began, left - 1
    return spent


def contract_of(
    task: PretextTask, config: PretrainConfig, plan: Plan, spec: BackboneSpec, stored: list[Stored]
) -> Contract:
    return Contract(
        kind="pretrained",
        backbone=spec,
        plan=plan,
        trained=(),  # told once they are
        task=config.task,
        options=task.resolved(),
        source=str(Path(config.source).resolve()),
        volumes=tuple(sorted(read_meta(item.path)["voxel_hash"] for item in stored)),
        subjects=tuple(sorted({subject_hash(item.case.subject) for item in stored})),
        step=config.steps,
    )

"""The stage `finetune`: a few labelled subjects to a segmentation network."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl

from medcl.checkpoint import Contract, load_weights, save_weights, transfer
from medcl.config import FinetuneConfig, nearest
from medcl.data.case import Manifest
from medcl.data.crops import CropDataset
from medcl.data.plan import Plan, derive_plan, round_up
from medcl.data.prepare import Stored
from medcl.data.signature import subject_hash
from medcl.data.splits import begun_split, cases_of, draw_labelled, make_split
from medcl.data.stage import describe, load_source, measured, plan_for, prepare_all, tell_problems
from medcl.data.store import read_meta
from medcl.downstream.segmentation import SegmentationModule, Validate
from medcl.downstream.semi.base import SemiMethod
from medcl.downstream.semi.registry import build_method
from medcl.errors import MedclError
from medcl.files import read_json, write_json
from medcl.leakage import compared, refuse
from medcl.memory import keep_memory
from medcl.networks.backbones import Backbone, BackboneSpec, build_backbone
from medcl.networks.parts import check_parts, compile_network
from medcl.precision import choose_precision, keep_precision
from medcl.run import begun_run, log, open_run, write_provenance
from medcl.scale import await_leader, check_scale
from medcl.seen import FINE_TUNING, SELECTION, Seen, save_seen, seen_by, seen_in
from medcl.trained import Record
from medcl.training import choose_accelerator, fit, hours, resume_step, trainer_for
from medcl.transforms.compose import Compose, StrongAugmentation, strong_augmentation
from medcl.transforms.margin import margin_for
from medcl.transforms.mixing import MIXES
from medcl.transforms.random import mix, mixed_seed

SEED = "seed.json"  # what the random numbers of a run are made from
FOREGROUND = 0.5  # share of patches that must contain a label


def finetune(config: FinetuneConfig) -> Path:
    """Trains a segmentation network with a few labelled subjects, from pretrained or random weights.

    Test subjects are set apart here and not looked at: `medcl evaluate RUN` does.

    Returns:
        The run folder.

    Raises:
        MedclError: a setting cannot work, or the pretrained weights do not fit; told before any training.
    """
    began = time.monotonic()
    check(config)
    keep_memory()
    accelerator = choose_accelerator(config.accelerator)
    check_scale(config, accelerator)
    led = await_leader(config)  # what another process has prepared
    precision = choose_precision(config.precision, accelerator, config.out if config.resume or led else "")
    begun = led or begun_run(config)
    manifest = load_source(config.source, config.channel, begun)
    split = begun_split(begun) or draw_labelled(
        make_split(manifest, config.test_fraction, config.val_fraction, config.split_seed),
        manifest, config.labels, config.draw,
    )  # fmt: skip

    pretrained = None if config.init == "none" else load_weights(config.init)
    contract = pretrained[0] if pretrained else None
    plan = Plan.load(begun) if begun else choose_plan(manifest, config, contract, accelerator)
    values = label_values(manifest, plan)
    seed = begun_seed(config, begun)
    pl.seed_everything(seed, verbose=False)
    backbone = choose_backbone(config, contract, plan, len(values) + 1)
    taken = transfer(*pretrained, backbone, config.init) if pretrained else None
    record = Record(backbone, taken.taken if taken else None)
    semi = build_method(config.semi, backbone, config.semi_options)
    unlabelled = tuple(sorted(set(split.train) - set(split.labelled))) if semi else ()
    if semi and not unlabelled:
        raise MedclError("every training subject is labelled", "--semi", "Lower --labels, or add unlabelled scans.")
    trained = cases_of(manifest, split.labelled, labelled=True) + cases_of(manifest, unlabelled)
    val_cases, test_cases = (cases_of(manifest, subjects, labelled=True) for subjects in (split.val, split.test))
    seen = seen_by(config.init) if pretrained else Seen()
    seen += seen_in(manifest, trained, FINE_TUNING, config.out, config.store)
    chosen_by = seen_in(manifest, val_cases, SELECTION, config.out, config.store)
    held = chosen_by + seen_in(manifest, test_cases, store=config.store)
    leakage = compared(seen, held, store=config.store)
    refuse(leakage, config.allow_leakage, config.source)

    run = open_run(config.out, config, "finetune", config.resume)
    if not led:
        keep_precision(run, precision, accelerator)
    first = resume_step(run) if config.resume else 0
    log.info("%s: %s.", config.source, describe(manifest))
    tell_problems(manifest)
    if taken:
        log.info("%s: %s.", config.init, taken)
    if contract and plan.patch_size != contract.plan.patch_size and not config.plan:
        ours, theirs = (" x ".join(map(str, each.patch_size)) for each in (plan, contract.plan))
        log.info("Patches of %s voxels, by the scans of this folder; in %s they were %s.", ours, config.init, theirs)
    if leakage["sentence"]:
        log.warning("%s.", leakage["sentence"])
    used = cases_of(manifest, (*split.labelled, *split.val), labelled=True) + cases_of(manifest, unlabelled)
    stored, left = prepare_all(manifest, plan, config.store, cases=used)
    if not led:
        plan.save(run / "plan.json")
        split.save(run / "split.json")
        write_json(run / SEED, {"seed": seed})
        write_json(run / "audit.json", leakage)
        save_seen(run, seen + chosen_by)
        left.with_cases(manifest.cases).save(run / "manifest.json")
    train = [item for item in stored if item.case.subject in split.labelled]
    val = [(item.case.subject, item.path) for item in stored if item.case.subject in split.val]
    lost = sorted(set(split.labelled) - {item.case.subject for item in train})
    if lost and (config.labels != "all" or not train):
        if not (config.resume or led):
            (run / "config.yaml").unlink()  # nothing was trained: the folder may be used again
        raise MedclError(
            f"the labelled volumes of {', '.join(lost)} cannot be used", config.source,
            "Mend them or take them away; or use another --draw.",
        )  # fmt: skip
    images = [item for item in stored if item.case.subject in unlabelled]
    if semi and not images:
        raise MedclError("no unlabelled volume can be used", config.source, "Mend them, or use --semi none.")
    drawn = ", ".join(split.labelled[:8]) + (", ..." if len(split.labelled) > 8 else "")
    log.info(
        "Training on %d volumes of %d labelled subjects (draw %d: %s).",
        len(train),
        len({item.case.subject for item in train}),
        config.draw,
        drawn,
    )
    if semi:
        log.info("%s on %d unlabelled volumes of %d subjects.", config.semi, len(images), len(unlabelled))
    log.info("Validating on %d volumes; %d subjects are kept for test.", len(val), len(split.test))
    if not val:
        log.info("No subject is left to validate on: the last weights are kept.")

    patch = round_up(plan.patch_size, backbone.multiple)
    augmentation = augmentation_for(config, plan, patch)
    margin = augmentation.margin if augmentation else (0, 0, 0)
    if any(margin):
        log.info("Around patches of %s voxels a margin of %s is read, for augmentation to move in.",
                 *(" x ".join(map(str, n)) for n in (patch, margin)))  # fmt: skip
    dataset = CropDataset([item.path for item in train], patch, seed, True, FOREGROUND, margin)
    given = [p for name, p in backbone.net.named_parameters() if taken and name in taken.names]
    # another seed than the labelled patches have: the same would augment both alike
    more = CropDataset([item.path for item in images], patch, mix(seed, 1), margin=margin) if semi else None
    check_parts(config.parts, backbone.spec.norm)
    backbone.parts = config.parts
    if config.compile:
        compile_network(backbone)
    module = SegmentationModule(backbone, dataset, config, augmentation, values, plan.spacing, given, semi, more)
    done = contract_of(config, plan, backbone.spec, values, train + images, semi)

    def keep(step: int) -> None:
        if not led:
            trained = record.trained(module.backbone, trainer.optimizers, module.kept)
            save_weights(run, module.kept, replace(done, step=step).with_trained(trained, module.kept))

    validate = Validate(val, patch, config.val_every or max(1, config.steps // 10), precision, accelerator, keep)
    trainer = trainer_for(
        run, steps=config.steps, accelerator=accelerator, precision=precision, seed=seed,
        every=config.checkpoint_every, title="finetune", resume_step=first, callbacks=(validate,), scale=config,
    )  # fmt: skip
    fit(trainer, module, run if first else None)
    if led:
        return run
    facts: dict[str, Any] = {"best_step": validate.best_step, "val_dice": validate.best if val else None}
    if leakage["sentence"]:
        facts["leakage"] = leakage["sentence"]
    write_provenance(
        run, began, accelerator=accelerator, precision=precision, seed=config.seed, resumed_at=first, **facts
    )
    if val:
        log.info("Best validation Dice %.3f at step %d.", validate.best, validate.best_step)
    log.info("Network in %s after %s.", run / "weights", hours(time.monotonic() - began))
    return run


def begun_seed(config: FinetuneConfig, begun: Path | None) -> int:
    """Seed of weights, patches and augmentation; of a run that goes on, the one that it began with."""
    if begun is None:
        return mixed_seed(config.seed, config.draw)
    if (begun / SEED).exists():
        return int(read_json(begun / SEED)["seed"])
    return config.seed + config.draw  # as of runs begun before November 2026, where seed 0, draw 1 was seed 1, draw 0


def augmentation_for(config: FinetuneConfig, plan: Plan, patch: tuple[int, int, int]) -> Compose | None:
    """Of labelled and unlabelled patches, with the margin that is read around them; None for `none`."""
    if config.augment == "none":
        return None
    preset = StrongAugmentation(flip=(0.5, 0.5, 0.5) if config.flip else (0.0, 0.0, 0.0))
    room = [extent - n for extent, n in zip(plan.volume_size, patch, strict=True)]
    margin = margin_for(strong_augmentation(plan.modality, plan.spacing, preset), patch, plan.spacing, room)
    return strong_augmentation(plan.modality, plan.spacing, preset, margin)


def check(config: FinetuneConfig) -> None:
    """Refuses settings that cannot work, before anything is read."""
    for name in ("steps", "batch_size", "checkpoint_every", "parts"):
        if getattr(config, name) < 1:
            raise MedclError(f"{getattr(config, name)} is not positive", f"--{name}", "Give at least 1.")
    if config.lr <= 0:
        raise MedclError(f"{config.lr} is not positive", "--lr", "Give a positive number.")
    if not 0 <= config.warmup < 1:
        raise MedclError(f"{config.warmup} is no share of the steps", "--warmup", "Give 0 or more, below 1.")
    if not 0 <= config.pretrained_lr <= 10:
        raise MedclError(f"{config.pretrained_lr} is no share of --lr", "--pretrained_lr", "Give 0 to 10.")
    if not 0 <= config.frozen <= 1:
        raise MedclError(f"{config.frozen} is no share of the steps", "--frozen", "Give 0 to 1.")
    if config.val_every < 0:
        raise MedclError("negative", "--val_every", "Give 0 or more.")
    if config.seed < 0 or config.draw < 0 or config.workers < 0:
        raise MedclError("negative", "--seed, --draw or --workers", "Give 0 or more.")
    if config.augment not in ("strong", "none"):
        raise MedclError(f"unknown augmentation {config.augment!r}", "--augment", "Use strong or none.")
    if not 0 < config.layer_decay <= 1:
        raise MedclError(f"{config.layer_decay} is no factor", "--layer_decay", "Give more than 0, up to 1.")
    if config.strategy == "fsdp":
        raise MedclError("divides weights in pretraining alone", "--strategy fsdp", "Use ddp.")
    if config.layer_decay != 1 and config.init == "none":
        raise MedclError("no weights are given that it could slow", "--layer_decay", "Name them with --init.")
    if config.core_tuning < 0:
        raise MedclError("negative", "--core_tuning", "Give 0 or more.")
    if config.mix not in MIXES:
        raise MedclError(f"unknown way to mix {config.mix!r}", "--mix", nearest(config.mix, MIXES))
    if config.mix != "none" and config.batch_size < 2 and (config.semi == "none" or config.mix == "mixup"):
        raise MedclError("one patch a step has no partner", "--mix", "Raise --batch_size, or use --mix none.")
    if config.semi != "none" and config.augment == "none":
        raise MedclError(
            "without augmentation the student sees what the teacher sees", "--semi", "Use --augment strong."
        )


def choose_plan(manifest: Manifest, config: FinetuneConfig, contract: Contract | None, device: str) -> Plan:
    """The plan of the pretrained network, with patches for this data set; else the user's, else a derived one.

    Spacing, normalisation and strides belong to the weights; patch size and labels belong to the task.
    """
    if config.plan or contract is None:
        plan = plan_for(manifest, config.plan, device=device, n4=config.n4, store=config.store)
        if 2 in (config.spatial_dims, contract.backbone.spatial_dims if contract else 3):
            plan = plan.slicewise()
        if contract and plan.preparation() != contract.plan.preparation():
            raise MedclError(
                "prepares volumes otherwise than the pretrained network has seen them", config.plan,
                f"Use the plan of {config.init}, or leave out --plan.",
            )  # fmt: skip
        return plan if plan.labels else replace(plan, labels=manifest.label_names)
    kept = contract.plan
    if config.n4 and not kept.n4:
        raise MedclError(
            f"{config.init} was pretrained without bias-field correction", "--n4", "Leave it out, or pretrain with it."
        )
    if manifest.cases and {kept.modality, *(c.modality for c in manifest.cases)} >= {"CT", "MR"}:
        raise MedclError(
            f"was pretrained on {kept.modality}, this folder holds the other modality", config.init,
            "Use --init none, or pretrain on such scans.",
        )  # fmt: skip
    headers = derive_plan(manifest, spacing=kept.spacing, device=device)
    own = measured(manifest, replace(kept, labels=headers.labels), device, config.store)
    patch = round_up(own.patch_size, kept.total_stride)
    return replace(kept, patch_size=patch, volume_size=own.volume_size, labels=own.labels)


def label_values(manifest: Manifest, plan: Plan) -> tuple[int, ...]:
    """Label values that are classes: those that the data set names, else those found in its label maps."""
    if plan.labels:
        return tuple(sorted(plan.labels))
    from medcl.data.io import read_volume

    found: set[int] = set()
    for case in manifest.labelled:
        path = manifest.label_path(case)
        assert path is not None
        try:
            found |= {int(value) for value in np.unique(read_volume([path]).array)}
        except MedclError:
            continue  # told when the case is prepared
    values = tuple(sorted(v for v in found if 0 < v < 256))
    if not values:
        raise MedclError(
            "the label maps hold no foreground", manifest.root, "Check which files are labels: `medcl scan`."
        )
    return values


def choose_backbone(config: FinetuneConfig, contract: Contract | None, plan: Plan, classes: int) -> Backbone:
    """The pretrained network rebuilt with this task's classes, or a new one; what the user names wins."""
    kept = contract.backbone if contract else BackboneSpec(strides=plan.strides)
    spec = replace(
        kept,
        name=config.backbone or kept.name,
        width=config.width or kept.width,
        norm=config.norm or kept.norm,
        spatial_dims=config.spatial_dims or kept.spatial_dims,
        strides=plan.strides,
        out_channels=classes,
    )
    return build_backbone(spec)


def contract_of(
    config: FinetuneConfig, plan: Plan, spec: BackboneSpec, values: tuple[int, ...], train: list[Stored],
    semi: SemiMethod | None,
) -> Contract:  # fmt: skip
    settings = {"semi_options": asdict(semi.options)} if semi else {}  # with the defaults of today
    return Contract(
        kind="segmentation",
        backbone=spec,
        plan=plan,
        trained=(),  # told once they are
        task="segmentation",
        options={"init": config.init, "semi": config.semi, **settings},
        label_values=values,
        source=str(Path(config.source).resolve()),
        volumes=tuple(sorted(read_meta(item.path)["voxel_hash"] for item in train)),
        subjects=tuple(sorted({subject_hash(item.case.subject) for item in train})),
    )

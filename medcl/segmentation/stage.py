"""The stage `finetune`: a few labelled subjects to a segmentation network."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from medcl.checkpoint import Contract, load_weights, save_weights, transfer
from medcl.config import FinetuneConfig
from medcl.dataset.case import Case
from medcl.dataset.splits import Split, cases_of, draw_labelled, make_split
from medcl.errors import MedclError
from medcl.leakage.audit import compared, refuse
from medcl.leakage.seen import FINE_TUNING, SELECTION, Seen, seen_by, seen_in
from medcl.networks.backbones import Backbone, BackboneSpec, build_backbone
from medcl.networks.parts import check_parts, compile_network
from medcl.runtime.files import read_json
from medcl.runtime.run import log
from medcl.runtime.trained import Record
from medcl.segmentation.module import SegmentationModule, Validate
from medcl.segmentation.planning import choose_plan, label_values
from medcl.segmentation.semi.base import SemiMethod
from medcl.segmentation.semi.registry import build_method
from medcl.store.crops import CropDataset
from medcl.store.plan import Plan, round_up
from medcl.store.prepare import Stored
from medcl.store.signature import subject_hash
from medcl.store.volumes import read_meta
from medcl.study import Study
from medcl.transforms.compose import Compose, StrongAugmentation, strong_augmentation
from medcl.transforms.margin import margin_for
from medcl.transforms.random import mix, mixed_seed

SEED = "seed.json"  # what the random numbers of a run are made from
FOREGROUND = 0.5  # share of patches that must contain a label


@dataclass(frozen=True)
class Subjects:
    """Who does what in a fine-tuning.

    Attributes:
        split: training, validation and test subjects, and the labelled ones among those that train.
        unlabelled: training subjects whose images alone are used.
    """

    split: Split
    unlabelled: tuple[str, ...]

    def used(self, study: Study[FinetuneConfig]) -> tuple[Case, ...]:
        """Cases that are read while training; test cases are not."""
        labelled = (*self.split.labelled, *self.split.val)
        return cases_of(study.manifest, labelled, labelled=True) + cases_of(study.manifest, self.unlabelled)


@dataclass(frozen=True)
class Prepared:
    """Prepared volumes by their use: labelled, unlabelled, and to validate on."""

    train: list[Stored]
    images: list[Stored]
    val: list[Stored]


def finetune(config: FinetuneConfig) -> Path:
    """Trains a segmentation network with a few labelled subjects, from pretrained or random weights.

    Test subjects are set apart here and not looked at: `medcl evaluate RUN` does.

    Returns:
        The run folder.

    Raises:
        MedclError: a setting cannot work, or the pretrained weights do not fit; raised before any training.
    """
    check(config)
    study = Study(config, "finetune")
    pretrained = None if config.init == "none" else load_weights(config.init)
    contract = pretrained[0] if pretrained else None
    split = study.split(lambda: new_split(study))
    plan = study.plan(lambda: choose_plan(study.manifest, config, contract, study.accelerator))
    values = label_values(study.manifest, plan)
    seed = seed_of(config, study.previous_run)
    pl.seed_everything(seed, verbose=False)
    backbone = choose_backbone(config, contract, plan, len(values) + 1)
    taken = transfer(*pretrained, backbone, config.init) if pretrained else None
    record = Record(backbone, taken.taken if taken else None)
    semi = build_method(config.semi, backbone, config.semi_options)
    subjects = Subjects(split, unlabelled_of(split, semi))
    seen, leakage = audited(study, subjects)

    study.begin()
    if taken:
        log.info("%s: %s.", config.init, taken)
    log_patches(config, plan, contract)
    if leakage["sentence"]:
        log.warning("%s.", leakage["sentence"])
    stored, manifest = study.prepare(plan, subjects.used(study))
    manifest = manifest.with_cases(study.manifest.cases)
    study.write(plan, split, manifest, {SEED: {"seed": seed}, "audit.json": leakage}, seen)
    prepared = by_use(study, subjects, stored)
    log_subjects(config, subjects, prepared)
    module = module_for(config, prepared, plan, backbone, values, seed, taken.names if taken else set(), semi)
    done = contract_of(config, plan, backbone.spec, values, prepared.train + prepared.images, semi)

    def keep(step: int) -> None:
        if not study.is_follower:
            network = module.final_backbone
            trained = record.trained(module.backbone, trainer.optimizers, network)
            save_weights(study.run, network, replace(done, step=step).with_trained(trained, network))

    validate = validation(study, prepared.val, module.dataset.size, keep)
    trainer = study.trainer("finetune", seed, validate)
    study.fit(trainer, module)
    if prepared.val:
        log.info("Best validation Dice %.3f at step %d.", validate.best, validate.best_step)
    facts = {"best_step": validate.best_step, "val_dice": validate.best if prepared.val else None}
    return study.end("Network", **facts, **({"leakage": leakage["sentence"]} if leakage["sentence"] else {}))


def new_split(study: Study[FinetuneConfig]) -> Split:
    """The split by subject, with the labelled subjects of this draw."""
    config = study.config
    split = make_split(study.manifest, config.test_fraction, config.val_fraction, config.split_seed)
    return draw_labelled(split, study.manifest, config.labels, config.draw)


def unlabelled_of(split: Split, semi: SemiMethod | None) -> tuple[str, ...]:
    """Training subjects that a semi-supervised method takes without their labels.

    Raises:
        MedclError: there are none.
    """
    unlabelled = tuple(sorted(set(split.train) - set(split.labelled))) if semi else ()
    if semi and not unlabelled:
        raise MedclError("every training subject is labelled", "--semi", "Lower --labels, or add unlabelled scans.")
    return unlabelled


def audited(study: Study[FinetuneConfig], subjects: Subjects) -> tuple[Seen, dict[str, Any]]:
    """What the weights will have seen, and how it compares with validation and test volumes.

    Raises:
        MedclError: such volumes were seen, and that is not allowed.
    """
    config, manifest, split = study.config, study.manifest, subjects.split
    trained = cases_of(manifest, split.labelled, labelled=True) + cases_of(manifest, subjects.unlabelled)
    val, test = (cases_of(manifest, part, labelled=True) for part in (split.val, split.test))
    seen = Seen() if config.init == "none" else seen_by(config.init)
    seen += seen_in(manifest, trained, FINE_TUNING, config.out, config.store)
    chosen_by = seen_in(manifest, val, SELECTION, config.out, config.store)
    held = chosen_by + seen_in(manifest, test, store=config.store)
    leakage = compared(seen, held, store=config.store)
    refuse(leakage, config.allow_leakage, config.source)
    return seen + chosen_by, leakage


def by_use(study: Study[FinetuneConfig], subjects: Subjects, stored: list[Stored]) -> Prepared:
    """Divides prepared volumes by what they are used for.

    Raises:
        MedclError: labelled volumes that were drawn cannot be used, or no unlabelled one can.
    """
    config, split = study.config, subjects.split
    train = [item for item in stored if item.case.subject in split.labelled]
    lost = sorted(set(split.labelled) - {item.case.subject for item in train})
    if lost and (config.labels != "all" or not train):
        study.abandon()
        raise MedclError(
            f"the labelled volumes of {', '.join(lost)} cannot be used", config.source,
            "Mend them or take them away; or use another --draw.",
        )  # fmt: skip
    images = [item for item in stored if item.case.subject in subjects.unlabelled]
    if subjects.unlabelled and not images:
        raise MedclError("no unlabelled volume can be used", config.source, "Mend them, or use --semi none.")
    return Prepared(train, images, [item for item in stored if item.case.subject in split.val])


def module_for(
    config: FinetuneConfig, prepared: Prepared, plan: Plan, backbone: Backbone, values: tuple[int, ...], seed: int,
    given: Collection[str], semi: SemiMethod | None,
) -> SegmentationModule:  # fmt: skip
    """Lightning's module, with patches, augmentation and margin.

    Args:
        values: label value of every class but the background.
        given: names of the tensors that come from a pretraining.
    """
    patch = round_up(plan.patch_size, backbone.multiple)
    augmentation = augmentation_for(config, plan, patch)
    margin = augmentation.margin if augmentation else (0, 0, 0)
    if any(margin):
        log.info("Around patches of %s voxels a margin of %s is read, for augmentation to move in.",
                 *(" x ".join(map(str, n)) for n in (patch, margin)))  # fmt: skip
    dataset = CropDataset([item.path for item in prepared.train], patch, seed, True, FOREGROUND, margin)
    # another seed than the labelled patches have: the same would augment both alike
    images = [item.path for item in prepared.images]
    unlabelled = CropDataset(images, patch, mix(seed, 1), margin=margin) if semi else None
    check_parts(config.parts, backbone.spec.norm)
    backbone.parts = config.parts
    pretrained = [p for name, p in backbone.net.named_parameters() if name in given]
    if config.compile:
        compile_network(backbone)
    return SegmentationModule(
        backbone, dataset, config, augmentation, values, plan.spacing, pretrained, semi, unlabelled
    )


def validation(study: Study[FinetuneConfig], val: list[Stored], patch: Sequence[int], keep: Any) -> Validate:
    """The callback that validates, and keeps the best weights by `keep`."""
    config = study.config
    volumes = [(item.case.subject, item.path) for item in val]
    every = config.val_every or max(1, config.steps // 10)
    return Validate(volumes, patch, every, study.precision, study.accelerator, keep)


def log_patches(config: FinetuneConfig, plan: Plan, contract: Contract | None) -> None:
    """Says where patches have another size than in the pretraining."""
    if contract and plan.patch_size != contract.plan.patch_size and not config.plan:
        ours, theirs = (" x ".join(map(str, each.patch_size)) for each in (plan, contract.plan))
        log.info("Patches of %s voxels, by the scans of this folder; in %s they were %s.", ours, config.init, theirs)


def log_subjects(config: FinetuneConfig, subjects: Subjects, prepared: Prepared) -> None:
    """Says who trains, validates and is kept for test."""
    split = subjects.split
    drawn = ", ".join(split.labelled[:8]) + (", ..." if len(split.labelled) > 8 else "")
    labelled = len({item.case.subject for item in prepared.train})
    log.info("Training on %d volumes of %d labelled subjects (draw %d: %s).",
             len(prepared.train), labelled, config.draw, drawn)  # fmt: skip
    if subjects.unlabelled:
        log.info("%s on %d unlabelled volumes of %d subjects.",
                 config.semi, len(prepared.images), len(subjects.unlabelled))  # fmt: skip
    log.info("Validating on %d volumes; %d subjects are kept for test.", len(prepared.val), len(split.test))
    if not prepared.val:
        log.info("No subject is left to validate on: the last weights are kept.")


def seed_of(config: FinetuneConfig, previous_run: Path | None) -> int:
    """Seed of weights, patches and augmentation; of a run that goes on, the one that it began with."""
    if previous_run is None:
        return mixed_seed(config.seed, config.draw)
    if (previous_run / SEED).exists():
        return int(read_json(previous_run / SEED)["seed"])
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
    """Refuses settings that cannot work together, before anything is read."""
    if config.strategy == "fsdp":
        raise MedclError("divides weights in pretraining alone", "--strategy fsdp", "Use ddp.")
    if config.layer_decay != 1 and config.init == "none":
        raise MedclError("no weights are given that it could slow", "--layer_decay", "Name them with --init.")
    if config.mix != "none" and config.batch_size < 2 and (config.semi == "none" or config.mix == "mixup"):
        raise MedclError("one patch a step has no partner", "--mix", "Raise --batch_size, or use --mix none.")
    if config.semi != "none" and config.augment == "none":
        raise MedclError(
            "without augmentation the student sees what the teacher sees", "--semi", "Use --augment strong."
        )


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
    """The contract of the weights, without the tensors that were trained."""
    settings = {"semi_options": asdict(semi.options)} if semi else {}  # with the defaults of today
    return Contract(
        kind="segmentation",
        backbone=spec,
        plan=plan,
        trained=(),  # added when weights are saved
        task="segmentation",
        options={"init": config.init, "semi": config.semi, **settings},
        label_values=values,
        source=str(Path(config.source).resolve()),
        volumes=tuple(sorted(read_meta(item.path)["voxel_hash"] for item in train)),
        subjects=tuple(sorted({subject_hash(item.case.subject) for item in train})),
    )

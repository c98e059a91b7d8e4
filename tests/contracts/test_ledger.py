"""Where published code departs from its paper, and what is done here instead: a test for each departure."""

from __future__ import annotations

import pytest
import torch
from battery import batch_for

from medcl.config import PretrainConfig
from medcl.losses.global_contrast import global_masks
from medcl.losses.voco import VARIANTS, prediction_loss, voco_loss
from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.pretext.registry import task_class
from medcl.runtime.optimizer import adamw
from medcl.runtime.precision import choose_precision
from medcl.store.plan import Plan
from medcl.transforms.compose import strong_augmentation

PLAN = Plan(volume_size=(24, 24, 24), patch_size=(24, 24, 24), strides=((2, 2, 2),) * 2)


def build(name: str, norm: str = "instance", **options):
    torch.manual_seed(0)
    backbone = build_backbone(BackboneSpec("unet", strides=PLAN.strides, width=4, norm=norm))
    return task_class(name)(backbone, PLAN, {"hidden": 16, "embedding": 8, **options}).train()


@pytest.mark.parametrize("partitions", [2, 3, 4, 6])
def test_no_image_of_a_gd_batch_is_empty_and_each_has_its_partners(partitions):
    """Chaitanya, G^D: the release leaves the last third of a batch as zeros, and is broken but for 4 partitions."""
    task = build("global_contrast", partitions=[1, 1, partitions], size=[8, 8, 4])
    views = task.views(batch_for(task, range(3)))
    assert views["view"].flatten(2).std(2).min() > 0
    volume, part = views["volume"].repeat_interleave(2), views["partition"].repeat_interleave(2)
    positive, negative = global_masks("GD", torch.arange(3 * partitions).repeat_interleave(2), volume, part)
    assert set(positive.sum(1).tolist()) == {1 + 2 * 2}  # its other version, and both of two other volumes
    assert set(negative.sum(1).tolist()) == {2 * 3 * (partitions - 1)}


def test_positives_of_gd_across_reads_are_of_different_volumes():
    """Chaitanya, G^D: the two sets of volumes of the release are drawn independently and may coincide."""
    volume = torch.tensor([0, 0, 1, 1, 1, 2])
    read, part = torch.arange(6), torch.zeros(6, dtype=torch.long)
    positive, _ = global_masks("GD", read, volume, part)
    assert positive.any() and not bool(positive[volume[:, None] == volume].any())


def test_running_statistics_are_carried_and_those_of_a_frozen_encoder_stay():
    """Chaitanya: the release leaves moving statistics behind, and moves those of the frozen encoder."""
    frozen = build_local(True)
    before = statistics(frozen)
    frozen.loss(frozen.views(batch_for(frozen, range(2))))
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(frozen), strict=True))
    free = build_local(False)
    free.loss(free.views(batch_for(free, range(2))))
    assert any(not torch.equal(a, b) for a, b in zip(before, statistics(free), strict=True))


def test_transferred_weights_bring_their_moving_statistics(tmp_path):
    """Chaitanya: the release leaves them behind."""
    from medcl.checkpoint import Contract, transfer

    trained = build_local(False)
    for _ in range(3):
        trained.loss(trained.views(batch_for(trained, range(2))))
    spec = trained.backbone.spec
    contract = Contract("pretrained", spec, PLAN, ("encoder",), "local_contrast")
    fresh = build_backbone(spec)
    transfer(contract, trained.backbone.net.state_dict(), fresh, "RUN")
    names = [n for n in fresh.tensor_names("encoder") if n.endswith(("running_mean", "running_var"))]
    assert names
    moved, own = trained.backbone.net.state_dict(), fresh.net.state_dict()
    assert all(torch.equal(moved[name], own[name]) for name in names)
    assert any(bool((moved[name] - (1.0 if name.endswith("var") else 0.0)).abs().max() > 1e-3) for name in names)


def build_local(freeze: bool):
    torch.manual_seed(0)
    backbone = build_backbone(BackboneSpec("unet", strides=PLAN.strides, width=4, norm="batch"))
    options = {"freeze_encoder": freeze, "embedding": 8, "region": 1, "regions": 2}
    return task_class("local_contrast")(backbone, PLAN, options).train()


def statistics(task) -> list[torch.Tensor]:
    return [b.clone() for module in task.backbone.encoder_modules() for b in module.buffers() if b.is_floating_point()]


def test_intensity_changes_reach_fine_tuning():
    """Chaitanya, fine-tuning: the release computes them in a branch that is never taken."""
    augmentation = strong_augmentation("MR")
    image = torch.linspace(-1, 1, 16**3).view(1, 1, 16, 16, 16).repeat(64, 1, 1, 1, 1)
    label = torch.zeros_like(image, dtype=torch.uint8)
    params = augmentation.draw(torch.arange(64), image.shape)
    changed = [
        bool((transform.apply(image, drawn) != image).any())
        for transform, drawn in zip(augmentation.transforms, params, strict=True)
    ]
    assert len(changed) >= 5 and all(changed)
    _, moved = augmentation.apply_both(image, label, params)
    assert not bool(moved.any())  # and no image is written into a label


def test_the_three_forms_of_voco_price_a_pair_as_each_was_published():
    """VoCo: the paper, its release and its extension have three objectives; see `Variant`."""
    y, wrong = torch.tensor([[[0.6, 0.4, 0.0, 0.0]]]), torch.tensor([[[0.1, 0.2, 0.5, 0.5]]])
    log = torch.log
    off = [-log(torch.tensor(1 - d)) for d in (0.5, 0.2)]
    half = -log(torch.tensor(0.5))
    want = {
        "paper": (off[0] + off[1] + 2 * half) / 4,
        "teacher": 0.6 * off[0] + 0.4 * off[1] + 0.25,
        "v2": 0.6 * off[0] + 0.4 * off[1] + half,
    }
    for name, value in want.items():
        form = VARIANTS[name]
        got = prediction_loss(wrong, y, form.positive_weighting, form.negative)
        torch.testing.assert_close(got, value, atol=1e-4, rtol=0)
    opposite = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]])  # a random crop, two base crops
    terms = {
        name: float(voco_loss(form, opposite, opposite, torch.tensor([[[1.0, 0.0]]]), torch.tensor([0]))["regularise"])
        for name, form in VARIANTS.items()
    }
    assert terms == pytest.approx({"paper": 1.0, "teacher": 0.0, "v2": 0.0})


def test_dropout_leaves_no_crop_without_features():
    """VoCo's extension: a `Dropout1d` on a matrix zeroes whole rows, in evaluation too."""
    head = build("voco", feature_dropout=0.2).projection_head
    assert float((head[0](torch.ones(200, 60)) == 0).float().mean(1).max()) < 1
    rows = torch.randn(8, 60)
    assert torch.equal(head.eval()[0](rows), rows)


def test_the_teacher_starts_as_the_student_and_follows_what_the_optimiser_made():
    """VoCo's release: a teacher of other random weights, updated before the step, with a constant momentum."""
    task = build("voco", momentum=0.5, feature_dropout=0.0)
    z, _ = task.embed(task.views(batch_for(task, range(2))))
    torch.testing.assert_close(z["student"], z["teacher"])
    weight = task.projection_head[0].weight
    copy = task.teacher.module["head"][0].weight
    before = copy.clone()
    with torch.no_grad():
        weight.add_(1.0)  # an optimiser's step
    task.after_step(0.0)
    torch.testing.assert_close(copy, before + 0.5)
    task.after_step(1.0)  # at the end of the run the momentum is 1
    torch.testing.assert_close(copy, before + 0.5)


def test_weight_decay_and_precision_are_those_asked_for():
    """VoCo's releases: `--decay` is ignored and mixed precision forced."""
    config = PretrainConfig("s", "o", weight_decay=0.3, precision="32")
    assert choose_precision(config.precision, "gpu") == "32-true"
    groups = adamw(build("voco"), config.lr, config.weight_decay, 10, 0.1)["optimizer"].param_groups
    decays = {all(p.ndim > 1 for p in group["params"]): group["weight_decay"] for group in groups}
    assert decays == {True: 0.3, False: 0.0}

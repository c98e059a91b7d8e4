"""VoCo's views against slicing, its teachers, its options, and that it learns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from medcl.errors import MedclError
from medcl.losses.voco import VARIANTS
from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.networks.ema import MomentumTeacher, cosine_momentum
from medcl.pretext.sizes import network_input
from medcl.pretext.voco import VoCo, base_grid, cut, tile
from medcl.store.plan import Plan

PLAN = Plan(volume_size=(35, 51, 36), strides=((2, 2, 2),) * 3)


def small_task(**options) -> VoCo:
    torch.manual_seed(0)
    options = {"hidden": 64, "embedding": 32, **options}
    return VoCo(build_backbone(BackboneSpec("unet", strides=PLAN.strides, width=8)), PLAN, options)


def test_crops_and_tiles_are_the_slices_they_say():
    volume = torch.arange(2 * 6 * 4 * 8).float().view(2, 1, 6, 4, 8)
    starts = torch.tensor([[[0, 1, 2], [3, 0, 4]], [[1, 2, 0], [2, 1, 3]]])
    crops = cut(volume, starts, (3, 2, 4))
    for b, k in itertools.product(range(2), range(2)):
        x, y, z = starts[b, k]
        assert torch.equal(crops[b, k], volume[b, :, x : x + 3, y : y + 2, z : z + 4])
    bases = tile(volume, (2, 2, 2))
    for n, (i, j, k) in enumerate(itertools.product(range(2), repeat=3)):
        want = volume[:, :, 3 * i : 3 * i + 3, 2 * j : 2 * j + 2, 4 * k : 4 * k + 4]
        assert torch.equal(bases[:, n], want)


@pytest.mark.parametrize(
    "plan,crop,grid",
    [
        (PLAN, (16, 16, 16), (2, 3, 2)),
        (Plan(spacing=(1.5, 1.5, 10), volume_size=(216, 256, 10), strides=((2, 2, 1),) * 3), (56, 56, 10), (3, 4, 1)),
    ],
)
def test_the_grid_follows_from_crop_and_volume(plan, crop, grid):
    assert base_grid(plan) == (crop, grid)


def test_a_single_base_crop_is_refused():
    with pytest.raises(MedclError, match="single base crop"):
        base_grid(PLAN, (32, 48, 32))


def test_crops_too_small_for_the_network_are_enlarged():
    assert network_input((16, 16, 16), (8, 8, 8)) == (16, 16, 16)
    assert network_input((16, 16, 16), (32, 32, 32)) == (64, 64, 64)


def batch_for(task: VoCo, seeds: list[int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "image": torch.randn(len(seeds), 1, *task.read_size),
        "seed": torch.tensor(seeds),
        "volume": torch.arange(len(seeds)),
    }


def test_without_augmentation_a_crop_is_found_where_its_label_says():
    task = small_task(flip=0.0, intensity="none")
    views = task.views(batch_for(task, [3]))
    best = views["labels"][0, 0].argmax()
    shared = np.intersect1d(views["crops"][0, 0].numpy(), views["bases"][0, best].numpy()).size
    assert shared == pytest.approx(float(views["labels"][0, 0, best]) * 16**3, abs=1)


@pytest.mark.parametrize("variant,follows", [("paper", set()), ("teacher", {"backbone", "head"}), ("v2", {"head"})])
def test_the_teacher_of_a_variant_starts_as_the_student_and_follows(variant, follows):
    task = small_task(variant=variant)
    parts = {} if task.teacher is None else dict(task.teacher.module.named_children())
    assert set(parts) == follows
    for name, teacher in parts.items():
        student = task.backbone if name == "backbone" else task.projection_head
        for mine, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
            assert torch.equal(mine, theirs) and not theirs.requires_grad
        with torch.no_grad():
            next(student.parameters()).add_(1.0)
    task.after_step(0.0)
    for name, teacher in parts.items():
        student = task.backbone if name == "backbone" else task.projection_head
        gap = next(student.parameters()) - next(teacher.parameters())
        torch.testing.assert_close(gap, torch.full_like(gap, task.options.momentum))


def test_the_projector_teacher_reads_the_shared_backbone():
    task = small_task(variant="v2", feature_dropout=0.0)
    z, _ = task.embed(task.views(batch_for(task, [1, 2])))
    torch.testing.assert_close(z["student"], z["teacher"])
    assert z["student"].requires_grad and not z["teacher"].requires_grad


def test_the_term_between_volumes_needs_two_of_them():
    task = small_task(variant="v2")
    with pytest.raises(MedclError, match="2 different volumes"):
        task.check(volumes=1, batch_size=4)
    with pytest.raises(MedclError, match="2 volumes a step"):
        task.check(volumes=9, batch_size=1)
    task.check(volumes=2, batch_size=2)
    small_task().check(volumes=1, batch_size=1)


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "v3"},
        {"crops": 0},
        {"crops": True},
        {"hidden": 1.5},
        {"momentum": 1.1},
        {"momentum": float("nan")},
        {"feature_dropout": 1.0},
        {"regulariser": -1},
        {"regulariser": float("inf")},
        {"flip": "often"},
        {"intensity": "wild"},
        {"crop_size": 16},
        {"crop_size": [16, 16]},
        {"grid": [2, 0, 2]},
        {"grid": "222"},
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(options):
    with pytest.raises(MedclError, match=next(iter(options))):
        small_task(**options)


def test_dropout_of_features_drops_channels_and_not_crops():
    task = small_task(feature_dropout=0.5)
    dropped = task.projection_head[0](torch.ones(6, 400))
    assert bool(((dropped == 0).float().mean(1) - 0.5).abs().max() < 0.15)
    assert torch.equal(task.projection_head.eval()[0](torch.ones(6, 400)), torch.ones(6, 400))


def test_momentum_rises_to_one():
    values = [cosine_momentum(0.99, p) for p in (0, 0.5, 1)]
    assert values == pytest.approx([0.99, 0.995, 1.0])
    teacher = MomentumTeacher(torch.nn.Linear(2, 2))
    assert not teacher.train().training


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_batch_of_views_can_be_learned(variant):
    task = small_task(variant=variant, flip=0.0, intensity="none", feature_dropout=0.0, crops=2, grid=(2, 2, 1))
    views = task.views(batch_for(task, [1, 2]))
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], 2e-3)
    losses = []
    for _ in range(40):
        parts = task.loss(views)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        task.after_step(0.0)
        losses.append(float(parts["predict"].detach()))
    assert losses[-1] < 0.6 * losses[0]
    assert parts["similarity_pos"] > parts["similarity_neg"] + 0.1

"""VoCo's labels against voxel counting, its loss against a loop, its views against slicing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from medcl.data.plan import Plan
from medcl.errors import MedclError
from medcl.losses.voco import base_regulariser, overlap_labels, prediction_loss, similarities, teacher_loss
from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.networks.ema import MomentumTeacher, cosine_momentum
from medcl.pretext.voco import VoCo, base_grid, cut, network_input, tile

PLAN = Plan(volume_size=(35, 51, 36), strides=((2, 2, 2),) * 3)


def small_task(**options) -> VoCo:
    torch.manual_seed(0)
    options = {"hidden": 64, "embedding": 32, **options}
    return VoCo(build_backbone(BackboneSpec("unet", strides=PLAN.strides, width=8)), PLAN, options)


@pytest.mark.parametrize("crop,grid", [((4, 4, 4), (2, 3, 2)), ((6, 4, 2), (2, 2, 1)), ((3, 5, 7), (1, 2, 3))])
def test_overlap_labels_count_voxels(crop, grid):
    rng = np.random.default_rng(0)
    canvas = [c * g for c, g in zip(crop, grid, strict=True)]
    owner = np.zeros(canvas, dtype=int)
    for n, (i, j, k) in enumerate(itertools.product(*map(range, grid))):
        owner[i * crop[0] : (i + 1) * crop[0], j * crop[1] : (j + 1) * crop[1], k * crop[2] : (k + 1) * crop[2]] = n
    starts = np.array([[rng.integers(0, s - c + 1) for s, c in zip(canvas, crop, strict=True)] for _ in range(20)])
    labels = overlap_labels(torch.tensor(starts)[None].float(), torch.tensor(crop).float(), grid)[0].numpy()
    for start, row in zip(starts, labels, strict=True):
        inside = owner[tuple(slice(s, s + c) for s, c in zip(start, crop, strict=True))]
        counted = np.bincount(inside.ravel(), minlength=math.prod(grid)) / math.prod(crop)
        np.testing.assert_allclose(row, counted, atol=1e-6)


def reference_loss(pc, pb, tc, tb, y):
    """The teacher form spelled out pair by pair."""

    def cos(a, b):
        return max(0.0, float(a @ b) / (math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))))

    positive, weight, negative, pairs = 0.0, 0.0, [], []
    for v in range(len(pc)):
        for c, b in itertools.product(range(pc.shape[1]), range(pb.shape[1])):
            guess = 0.5 * (cos(pc[v, c], tb[v, b]) + cos(tc[v, c], pb[v, b]))
            target = float(y[v, c, b])
            if target > 0:
                positive += -target * math.log(1 - abs(target - guess) + 1e-6)
                weight += target
            else:
                negative.append(guess**2)
        pairs += [cos(pb[v, i], pb[v, j]) ** 2 for i in range(pb.shape[1]) for j in range(i + 1, pb.shape[1])]
    return positive / weight + sum(negative) / len(negative) + sum(pairs) / len(pairs)


@pytest.mark.parametrize("shape", [(1, 2, 4, 8), (2, 3, 12, 5), (3, 1, 2, 16)])
def test_the_loss_equals_a_loop_over_pairs(shape):
    b, k, n, d = shape
    torch.manual_seed(sum(shape))
    pc, tc = torch.randn(2, b, k, d, dtype=torch.float64)
    pb, tb = torch.randn(2, b, n, d, dtype=torch.float64)
    y = torch.rand(b, k, n).square() * (torch.rand(b, k, n) > 0.5)
    y[:, :, 0] = 0.3
    ours = teacher_loss(pc, pb, tc, tb, y.float())["loss"]
    assert float(ours) == pytest.approx(reference_loss(pc, pb, tc, tb, y), rel=1e-5)


def test_a_perfect_prediction_costs_nothing():
    y = torch.tensor([[[0.25, 0.75, 0.0]]])
    assert float(prediction_loss(y.clone(), y)) == pytest.approx(0, abs=1e-5)


def test_constant_embeddings_cost_what_the_formula_says():
    one = torch.ones(1, 2, 4)
    y = torch.tensor([[[0.5, 0.5, 0.0]] * 2])
    parts = teacher_loss(one, torch.ones(1, 3, 4), one, torch.ones(1, 3, 4), y)
    assert float(parts["predict"]) == pytest.approx(math.log(2) + 1, abs=1e-4)
    assert float(parts["regularise"]) == pytest.approx(1, abs=1e-5)


def test_orthogonal_bases_are_not_pushed():
    assert float(base_regulariser(torch.eye(4)[None])) == 0


def test_no_gradient_reaches_the_teacher():
    leaves = [torch.randn(1, 3, 8, requires_grad=True) for _ in range(4)]
    teacher_loss(*leaves, torch.full((1, 3, 3), 1 / 3))["loss"].backward()
    assert leaves[0].grad is not None and leaves[1].grad is not None
    assert leaves[2].grad is None and leaves[3].grad is None


def test_similarities_stay_float32_under_autocast():
    z = torch.randn(1, 3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(similarities(z, z), similarities(z, z).float())
        assert float(similarities(z, z).max()) <= 1 + 1e-6


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


def test_views_depend_on_each_samples_seed_only():
    task = small_task()
    volume = torch.randn(3, 1, *task.read_size)
    seeds = torch.tensor([5, 6, 7])
    whole = task.views({"image": volume.clone(), "seed": seeds})
    alone = task.views({"image": volume[1:2].clone(), "seed": seeds[1:2]})
    for name in ("crops", "bases", "labels"):
        torch.testing.assert_close(whole[name][1:2], alone[name])


def test_without_augmentation_a_crop_is_found_where_its_label_says():
    task = small_task(flip=0.0, intensity="none")
    volume = torch.randn(1, 1, *task.read_size)
    views = task.views({"image": volume, "seed": torch.tensor([3])})
    best = views["labels"][0, 0].argmax()
    shared = np.intersect1d(views["crops"][0, 0].numpy(), views["bases"][0, best].numpy()).size
    assert shared == pytest.approx(float(views["labels"][0, 0, best]) * 16**3, abs=1)


def test_the_teacher_starts_as_the_student_and_follows():
    task = small_task()
    student = dict(task.backbone.named_parameters())
    teacher = task.teacher.module["backbone"]
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, student[name]) and not parameter.requires_grad
    with torch.no_grad():
        for parameter in student.values():
            parameter.add_(1.0)
    task.after_step(0.0)
    name, parameter = next(iter(teacher.named_parameters()))
    torch.testing.assert_close(student[name] - parameter, torch.full_like(parameter, task.options.momentum))


def test_momentum_rises_to_one():
    values = [cosine_momentum(0.99, p) for p in (0, 0.5, 1)]
    assert values == pytest.approx([0.99, 0.995, 1.0])
    teacher = MomentumTeacher(torch.nn.Linear(2, 2))
    assert not teacher.train().training


def test_one_batch_of_views_can_be_learned():
    task = small_task(flip=0.0, intensity="none", feature_dropout=0.0, momentum=0.9)
    views = task.views({"image": torch.randn(2, 1, *task.read_size), "seed": torch.tensor([1, 2])})
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

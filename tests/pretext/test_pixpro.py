"""Dense consistency against loops over voxels; places in mm under rotation, scaling and mirroring."""

from __future__ import annotations

import math

import pytest
import torch

from medcl.errors import MedclError
from medcl.losses.dense import close_pairs, dense_contrast, propagate, propagation_loss
from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.pretext.pixpro import PixPro
from medcl.store.plan import Plan

PLAN = Plan(spacing=(1.0, 1.0, 3.0), volume_size=(32, 32, 12), patch_size=(24, 24, 8), strides=((2, 2, 1), (2, 2, 2)))


def task(**options) -> PixPro:
    return PixPro(build_backbone(BackboneSpec("unet", strides=PLAN.strides, width=4)), PLAN, options)


def cos(a, b):
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("n,p,d,gamma", [(1, 5, 4, 2.0), (3, 8, 6, 1.0), (2, 4, 3, 3.0)])
def test_propagation_equals_a_loop(n, p, d, gamma):
    torch.manual_seed(p)
    x, g = torch.randn(2, n, p, d, dtype=torch.float64)
    ours = propagate(x, g, gamma)
    for i in range(n):
        for a in range(p):
            slow = sum(max(cos(x[i, a], x[i, b]), 0) ** gamma * g[i, b] for b in range(p))
            torch.testing.assert_close(ours[i, a].double(), slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n,p", [(1, 4), (3, 6)])
def test_the_losses_equal_loops(n, p):
    torch.manual_seed(p)
    y, t = torch.randn(2, n, 2, p, 5, dtype=torch.float64)
    close = torch.rand(n, p, p) > 0.6
    close[0] = True
    reads, pulls = [], []
    for i in range(n):
        pairs = [(a, b) for a in range(p) for b in range(p) if close[i, a, b]]
        if pairs:
            total = sum(cos(y[i, 0, a], t[i, 1, b]) + cos(y[i, 1, b], t[i, 0, a]) for a, b in pairs)
            reads.append(-total / len(pairs))
        for a, b in pairs:
            for student, teacher, q, k, far in (
                (y[i, 0], t[i, 1], a, b, ~close[i, a]),
                (y[i, 1], t[i, 0], b, a, ~close[i, :, b]),
            ):
                own = math.exp(cos(student[q], teacher[k]) / 0.3)
                others = sum(math.exp(cos(student[q], teacher[m]) / 0.3) for m in range(p) if far[m])
                pulls.append(-math.log(own / (own + others)))
    assert float(propagation_loss(y, t, close)) == pytest.approx(sum(reads) / len(reads), rel=1e-5)
    assert float(dense_contrast(y, t, close, 0.3)) == pytest.approx(sum(pulls) / len(pulls), rel=1e-5)


def test_reads_without_a_common_place_are_left_out():
    y, t = torch.randn(2, 2, 2, 3, 4, requires_grad=True)
    close = torch.zeros(2, 3, 3, dtype=torch.bool)
    assert float(propagation_loss(y, t, close).detach()) == 0
    close[1, 0, 0] = True
    alone = propagation_loss(y[1:], t[1:], close[1:])
    torch.testing.assert_close(propagation_loss(y, t, close), alone)
    propagation_loss(y, t, close).backward()


def test_distances_count_in_mm():
    one = torch.tensor([[[0.0, 0, 0], [0, 0, 3.0]]])
    near = close_pairs(one, one + torch.tensor([1.0, 0, 0]), torch.tensor([2.0]), 0.7)
    assert near.tolist() == [[[True, False], [False, True]]]


def test_equal_embeddings_are_the_floor_and_named_so():
    model = task()
    z, marks = model.embed(views_of(model))
    values = model.trivial(z, marks)
    assert values["collapsed"] == pytest.approx(-2, abs=1e-5) and "constant" not in values
    contrast = task(form="contrast")
    assert "constant" in contrast.trivial(*contrast.embed(views_of(contrast)))


def views_of(model: PixPro, **batch) -> dict[str, torch.Tensor]:
    image = torch.rand(2, 1, *model.read_size)
    return model.views({"image": image, "seed": torch.tensor([3, 4]), "volume": torch.arange(2), **batch})


def test_centres_are_where_the_view_says_it_is():
    """An image that holds its own coordinates: what a view shows at a map voxel's centre is that voxel's place."""
    model = task(flip=0.5, rotate_deg=20.0, intensity="none")
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in model.read_size), indexing="ij")
    for axis, values in enumerate(axes):
        views = views_of(model, image=values.expand(2, 1, -1, -1, -1).clone())
        # strided convolutions are centred on every `step`-th voxel of a view, the first among them
        x, y, z = (int(n) for n in model.step)
        shown = views["view"].flatten(0, 1)[:, :, ::x, ::y, ::z]
        told = views["mm"][..., axis] / PLAN.spacing[axis]
        inside = (views["mm"] / torch.tensor(PLAN.spacing)).sub(torch.tensor(model.read_size) / 2).abs()
        inside = (inside < torch.tensor(model.read_size) / 2 - 4).all(-1).flatten(0, 1)
        assert inside.sum() > 20
        torch.testing.assert_close(shown.flatten(1)[inside], told.flatten(0, 1)[inside], atol=1e-3, rtol=0)


def test_without_moves_a_voxel_pairs_with_itself():
    model = task(rotate_deg=0.0, scale=[1.0, 1.0], size=list(PLAN.volume_size), distance=0.3)
    assert model.read_size == PLAN.volume_size
    _, marks = model.embed(views_of(model))
    assert torch.equal(marks["close"], torch.eye(marks["close"].shape[1], dtype=torch.bool).expand_as(marks["close"]))


def test_the_map_is_the_deepest_that_is_small_enough():
    # 24 x 24 x 8: 6 x 6 x 4 at the bottom, 12 x 12 x 8 after the only block before the output layer
    assert task().blocks == 0 and task().trains == ("encoder",)
    assert task(blocks=1).map_size == (12, 12, 8) and task(blocks=1).trains == ("encoder", "decoder")


@pytest.mark.parametrize(
    "options",
    [{"form": "both"}, {"blocks": 7}, {"blocks": -1}, {"distance": 0}, {"temperature": 0}, {"scale": [2, 1]}],
    ids=str,
)
def test_options_that_cannot_work_are_refused(options):
    with pytest.raises(MedclError, match=next(iter(options))):
        task(**options)

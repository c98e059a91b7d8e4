"""Masked autoencoder: its masks and errors against loops, and that nothing hidden reaches the prediction."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from recipes import SmallSwin
from torch.nn.functional import avg_pool3d

from medcl.errors import MedclError
from medcl.losses import masked
from medcl.networks.backbones import BACKBONES, BackboneSpec, build_backbone
from medcl.networks.masked import MaskedEncoder
from medcl.pretext.mae import MAE, block_size, read_size
from medcl.store.plan import Plan

SMALL = {"unet": (16, 16, 16), "dynunet": (16, 16, 16), "swin_unetr": (32, 32, 64)}
PLAN = Plan(volume_size=(35, 50, 36), patch_size=(40, 56, 40), strides=((2, 2, 2),) * 3)


def small_task(name: str = "unet", strides=((2, 2, 2),) * 2, **options) -> MAE:
    torch.manual_seed(0)
    plan = Plan(strides=strides)
    spec = BackboneSpec(name, strides=strides, width=12 if name == "swin_unetr" else 4)
    backbone = SmallSwin(spec) if name == "swin_unetr" else build_backbone(spec)
    return MAE(backbone, plan, {"size": SMALL[name], "block": 4, **options})


def batch_of(task: MAE, count: int = 2, outside: int = 0) -> dict[str, torch.Tensor]:
    """Reads of noise; the first `outside` planes of each lie outside the volume and repeat its edge."""
    size = task.read_size
    image = torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(3))
    image[:, :, :outside] = image[:, :, outside : outside + 1]
    start = torch.tensor([[-outside, 0, 0]]).repeat(count, 1)
    extent = torch.tensor([[size[0] - outside, size[1] + 5, size[2]]]).repeat(count, 1)
    return {"image": image, "seed": torch.arange(count) + 11, "start": start, "extent": extent}


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio,count", [(0.75, 48), (0.6, 38), (0.001, 1), (0.999, 63)])
def test_every_crop_hides_exactly_the_same_number_of_whole_blocks(ratio, count):
    task = small_task(ratio=ratio)
    views = task.views(batch_of(task, 5))
    hidden = masked.hidden_voxels(views["hidden"], task.block, task.read_size)
    for n, (row, indices) in enumerate(zip(hidden, views["hidden"].tolist(), strict=True)):
        found = []
        for number, (i, j, k) in enumerate(itertools.product(range(4), repeat=3)):
            cell = row[0, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4, 4 * k : 4 * k + 4]
            assert bool(cell.all()) or not bool(cell.any())
            if bool(cell.all()):
                found.append(number)
        assert found == indices and len(found) == count, n


def test_masks_depend_on_each_crops_seed_only():
    task = small_task()
    batch = batch_of(task, 3)
    whole = task.views(batch)
    alone = task.views({name: rows[1:2] for name, rows in batch.items()})
    for name in whole:
        assert torch.equal(whole[name][1:2], alone[name])
    other = task.views({**batch, "seed": batch["seed"] + 100})
    assert not torch.equal(whole["hidden"], other["hidden"])
    assert not torch.equal(whole["hidden"], whole["other"])


def test_every_block_is_hidden_as_often_as_the_ratio_says():
    task = small_task(ratio=0.75)
    batch = batch_of(task, 1)
    batch = {name: rows.expand(2000, *rows.shape[1:]) for name, rows in batch.items() if name != "image"}
    views = task.views({**batch, "image": torch.zeros(2000, 1, 1, 1, 1), "seed": torch.arange(2000)})
    often = torch.bincount(views["hidden"].flatten(), minlength=64) / 2000
    assert float(often.min()) > 0.70 and float(often.max()) < 0.80  # five standard deviations are 0.048


# ---- no leak ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_hidden_voxels_and_padding_cannot_influence_the_prediction(name):
    task = small_task(name)
    views = task.views(batch_of(task, 1 if name == "swin_unetr" else 2, outside=3))
    hidden = masked.hidden_voxels(views["hidden"], task.block, task.read_size)
    secret = hidden | ~views["inside"]
    with torch.no_grad():
        before = task.embed(views)
        changed = task.embed({**views, "image": views["image"].masked_fill(secret, torch.nan)})
        assert torch.equal(before[0]["prediction"], changed[0]["prediction"])
        assert torch.equal(before[1]["features"], changed[1]["features"])
        # the comparison is not blind: one visible voxel is noticed
        place = tuple((~secret).nonzero()[0])
        poked = views["image"].clone()
        poked[place] += 5
        assert not torch.equal(before[0]["prediction"], task.embed({**views, "image": poked})[0]["prediction"])


def test_no_gradient_flows_from_the_prediction_to_what_is_hidden():
    task = small_task()
    views = task.views(batch_of(task))
    image = views["image"].clone().requires_grad_()
    task.embed({**views, "image": image})[0]["prediction"].square().sum().backward()
    hidden = masked.hidden_voxels(views["hidden"], task.block, task.read_size)
    assert not image.grad[hidden].any() and image.grad[~hidden].all()


def test_swin_puts_its_learned_token_where_all_voxels_of_a_token_are_hidden():
    task = small_task("swin_unetr")
    got = {}
    net = task.backbone.net.swinViT
    seen = torch.ones(1, 1, *task.read_size, dtype=torch.bool)
    seen[:, :, :4, :2, :2] = False
    seen[:, :, 8, 8, 8] = False  # a token that is hidden in part stays
    handle = net.pos_drop.register_forward_hook(lambda m, i, o: got.update(tokens=o.detach()))
    image = torch.randn(1, 1, *task.read_size)
    with torch.no_grad():
        task.encoder(image, seen)
        handle.remove()
        plain = net.patch_embed(image.masked_fill(~seen, 0))
    hidden = torch.zeros(16, 16, 32, dtype=torch.bool)
    hidden[:2, 0, 0] = True
    assert torch.equal(got["tokens"][0, :, hidden], task.encoder.token.detach()[:, None].expand(-1, 2))
    assert torch.equal(got["tokens"][0, :, ~hidden], plain[0, :, ~hidden])


@pytest.mark.parametrize("name", BACKBONES)
def test_with_nothing_hidden_the_encoder_is_the_backbones_own(name):
    backbone = small_task(name).backbone
    image = torch.randn(1, 1, *SMALL[name])
    with torch.no_grad():
        found = MaskedEncoder(backbone)(image, torch.ones_like(image, dtype=torch.bool))
        for ours, theirs in zip(found, backbone.encode(image), strict=True):
            assert torch.equal(ours, theirs)
    assert not backbone.net._forward_hooks and not any(m._forward_hooks for m in backbone.modules())


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_gradient_reaches_encoder_decoder_and_the_tasks_own_head_only(name):
    task = small_task(name)
    task.loss(task.views(batch_of(task, 1 if name == "swin_unetr" else 2)))["loss"].backward()
    net = task.backbone.net
    kept = set().union(*(task.backbone.tensor_names(part) for part in task.trains))
    for key, parameter in net.named_parameters(remove_duplicate=False):
        assert (parameter.grad is not None) == (key in kept), key
        if key in kept and parameter.ndim > 1:  # a bias before instance norm has a gradient of zero
            assert bool(parameter.grad.any()), key
    own = [p for key, p in task.named_parameters() if not key.startswith("backbone.")]
    assert len(own) == (3 if name == "swin_unetr" else 2) and all(p.grad is not None and p.grad.any() for p in own)


@pytest.mark.parametrize(
    "name,strides",
    [
        ("unet", ((2, 2, 2),)),
        ("unet", ((2, 2, 1), (2, 2, 2), (1, 2, 2))),
        ("dynunet", ((2, 2, 1), (2, 2, 2), (1, 2, 2))),
    ],
)
def test_the_prediction_has_the_size_of_the_crop_for_any_strides(name, strides):
    task = small_task(name, strides)
    views = task.views(batch_of(task))
    with torch.no_grad():
        features = task.encoder(views["image"], views["inside"])
        assert task.head(features).shape == views["image"].shape
        assert task.embed(views)[0]["prediction"].shape == (2, 48, 64)


def smooth_batch(task: MAE) -> dict[str, torch.Tensor]:
    batch = batch_of(task)
    return {**batch, "image": 8 * avg_pool3d(batch["image"], 5, 1, 2)}


@pytest.mark.parametrize("options", [{}, {"loss": "l1"}, {"normalise": "block"}], ids=["mse", "l1", "normalised"])
def test_one_batch_can_be_learned_to_below_interpolation(options):
    task = small_task(**options)
    views = task.views(smooth_batch(task))
    optimizer = torch.optim.AdamW(task.parameters(), 1e-2)
    trivial = task.trivial(*task.embed(views))
    for _ in range(60):
        loss = task.loss(views)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.6 * min(trivial.values())


@pytest.mark.parametrize("name", ["unet", "dynunet"])
def test_autocast_stays_finite_and_near_float32(name):
    task = small_task(name)
    views = task.views(batch_of(task))

    def step(enabled: bool):
        task.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z, marks = task.embed(views)
            assert z["prediction"].dtype == torch.float32
            loss = task.objective(z, marks)["loss"]
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None])
        assert torch.isfinite(grads).all()
        return float(loss.detach()), grads

    (exact, wanted), (rounded, found) = step(False), step(True)
    assert rounded == pytest.approx(exact, rel=0.05)
    assert (found - wanted).norm() < 0.3 * wanted.norm()


def test_trivial_values_are_those_of_a_loop_over_crops():
    task = small_task()
    views = task.views(smooth_batch(task))
    z, marks = task.embed(views)
    hidden = masked.hidden_voxels(views["hidden"], task.block, task.read_size)
    wanted = []
    for image, mask, inside in zip(views["image"], hidden, views["inside"], strict=True):
        level = image[inside & ~mask].mean()
        wanted.append(float((image[inside & mask] - level).square().mean()))
    values = task.trivial(z, marks)
    assert values["constant"] == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)
    assert values["interpolated"] < values["constant"]


def test_a_crop_that_is_padded_is_scored_by_its_own_voxels():
    task = small_task()
    batch = batch_of(task, outside=5)
    views = task.views(batch)
    z, marks = task.embed(views)
    loss = task.objective(z, marks)["loss"]
    elsewhere = marks["target"].masked_fill(~marks["inside"], 1e6)
    assert torch.equal(task.objective(z, {**marks, "target": elsewhere})["loss"], loss)
    assert not bool(marks["inside"].all()) and bool(marks["inside"].any())


def test_pairs_join_two_masks_of_the_same_crop():
    task = small_task()
    views = task.views(batch_of(task, 3))
    z, marks = task.embed(views)
    pairs = task.pairs(views, z, marks)
    with torch.no_grad():
        swapped = task.embed({**views, "hidden": views["other"]})[1]["features"]
    assert torch.equal(pairs.z, torch.cat([marks["features"], swapped]))
    for i, j in itertools.product(range(6), repeat=2):
        assert bool(pairs.positive[i, j]) == (i != j and i % 3 == j % 3)
        assert bool(pairs.negative[i, j]) == (i % 3 != j % 3)
    assert not torch.equal(pairs.z[:3], pairs.z[3:])


def test_flips_move_image_and_padding_alike_and_targets_follow_the_input():
    task = small_task(flip=1.0, intensity="weak")
    batch = batch_of(task, outside=3)
    kept = batch["image"].clone()
    views = task.views(batch)
    assert torch.equal(batch["image"], kept)
    plain = small_task(flip=1.0).views(batch)
    assert torch.equal(plain["image"], kept.flip(2, 3, 4))
    assert not bool(plain["inside"][:, :, -3:].any()) and bool(plain["inside"][:, :, :-3].all())
    _, marks = task.embed(views)
    assert torch.equal(marks["target"], masked.chosen_blocks(views["image"], task.block, views["hidden"]))


# ---- sizes and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan,multiple,size,block",
    [
        (PLAN, (8, 8, 8), (32, 48, 32), (8, 8, 8)),
        (PLAN, (32, 32, 32), (64, 64, 64), (8, 8, 8)),
        (
            Plan(spacing=(1.5, 1.5, 10), volume_size=(216, 256, 10), patch_size=(128, 128, 10)),
            (16, 16, 1), (128, 128, 10), (8, 8, 1),
        ),
        (Plan(volume_size=(300, 300, 200), patch_size=(96, 96, 96)), (16, 16, 16), (96, 96, 96), (8, 8, 8)),
        (Plan(volume_size=(9, 9, 9), patch_size=(16, 16, 16)), (8, 8, 8), (16, 16, 16), (8, 8, 8)),
    ],
)  # fmt: skip
def test_crop_and_block_follow_from_the_plan(plan, multiple, size, block):
    assert read_size(plan, multiple) == size
    assert block_size(size, plan.spacing, 8, 2 if multiple == (32,) * 3 else 1) == block


@pytest.mark.parametrize(
    "options,text",
    [
        ({"ratio": 0}, "ratio is 0"),
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"ratio": math.nan}, "ratio is nan"),
        ({"flip": 2}, "flip is 2"),
        ({"loss": "l2"}, "Use one of mse, l1"),
        ({"normalise": "patch"}, "Use one of none, block"),
        ({"intensity": "wild"}, "Use one of none, weak"),
        ({"block": 0}, "block is 0"),
        ({"block": (4, 4)}, "block is"),
        ({"block": (5, 4, 4)}, "does not divide"),
        ({"block": (16, 16, 16)}, "single block"),
        ({"size": (16, 18, 16)}, "total stride"),
        ({"size": (4, 4, 4)}, "total stride"),
        ({"size": 16}, "size is 16"),
        ({"rato": 0.5}, "ratio"),
    ],
)
def test_options_that_cannot_work_are_refused(options, text):
    with pytest.raises(MedclError, match=text):
        small_task(**options)


def test_blocks_of_half_tokens_are_refused():
    with pytest.raises(MedclError, match="whole tokens of 2"):
        small_task("swin_unetr", block=(4, 4, 1))

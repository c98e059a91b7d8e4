"""Global and local contrast on volumes: partitions, slices, regions that correspond, stages."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from medcl.errors import MedclError
from medcl.losses.local_contrast import nearest_disjoint, region_corners
from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.pretext.registry import task_class
from medcl.store.crops import Partitions
from medcl.store.plan import Plan
from medcl.transforms.correspondence import map_to_view, sample_at

PLAN = Plan(volume_size=(32, 32, 32), patch_size=(32, 32, 32), strides=((2, 2, 2),) * 2)


def build(name: str, plan: Plan = PLAN, dims: int = 3, backbone: str = "unet", **options):
    torch.manual_seed(0)
    spec = BackboneSpec(backbone, strides=plan.strides, width=4, spatial_dims=dims)
    return task_class(name)(build_backbone(spec), plan, options).train()


def batch_of(task, volumes: int, shape=(32, 32, 32)):
    rows = {name: [] for name in ("image", "seed", "volume", "place")}
    rng = np.random.default_rng(0)
    for number in range(volumes):
        image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(number))
        for place, start in enumerate(task.places(shape, task.read_size, rng)):
            window = tuple(slice(a, a + n) for a, n in zip(start, task.read_size, strict=True))
            rows["image"].append(image[(slice(None), *window)])
            rows["seed"].append(int(rng.integers(2**60)))
            rows["volume"].append(number)
            rows["place"].append(place)
    return {"image": torch.stack(rows.pop("image")), **{k: torch.tensor(v) for k, v in rows.items()}}


def test_a_slice_of_every_partition_as_the_paper_draws_them():
    rng = np.random.default_rng(0)
    drawn = np.array([[s[2] for s in Partitions((1, 1, 4))((8, 8, 14), (8, 8, 1), rng)] for _ in range(200)])
    for k in range(4):
        # floor(14 / 4) = 3 slices each; the last two are never drawn
        assert set(drawn[:, k]) == {3 * k, 3 * k + 1, 3 * k + 2}


def test_cells_of_a_grid_in_three_axes_and_short_axes():
    rng = np.random.default_rng(0)
    places = Partitions((2, 1, 3))
    assert places.count == 6
    for _ in range(20):
        starts = places((40, 30, 2), (8, 8, 1), rng)
        assert [max(s[0] + 4, 4) < 20 for s in starts] == [True] * 3 + [False] * 3
        assert [s[2] for s in starts[:3]] == [0, 0, 1]  # fewer slices than partitions: some share one
    assert places((4, 30, 40), (8, 8, 8), rng)[0][0] == -2  # shorter than the read: centred, and padded there


def test_more_partitions_than_slices_are_refused_at_the_start():
    thin = dataclasses.replace(PLAN, volume_size=(32, 32, 3), strides=((2, 2, 1),) * 2, patch_size=(32, 32, 3))
    for name in ("global_contrast", "local_contrast"):
        with pytest.raises(MedclError, match="4 partitions along axis 2"):
            build(name, thin, **({"strategy": "LD"} if name == "local_contrast" else {}))


def test_slices_are_seen_one_by_one():
    plan = PLAN.slicewise()
    task = build("global_contrast", plan, dims=2)
    assert task.size == (32, 32, 1) and task.read_size[2] == 1 and len(batch_of(task, 2)["image"]) == 8
    assert bool(task.loss(task.views(batch_of(task, 2)))["loss"].isfinite())
    for backbone in ("unet", "dynunet"):
        net = build_backbone(BackboneSpec(backbone, strides=plan.strides, width=4, spatial_dims=2, norm="batch")).eval()
        volume = torch.randn(1, 1, 16, 16, 5)
        with torch.no_grad():
            whole = net(volume)
            alone = net(volume[..., 2:3])
        torch.testing.assert_close(whole[..., 2:3], alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(MedclError, match="swin_unetr"):
        build_backbone(BackboneSpec("swin_unetr", spatial_dims=2))


@pytest.mark.parametrize(
    "name,options",
    [
        ("global_contrast", {"strategy": "GX"}),
        ("global_contrast", {"temperature": 0}),
        ("global_contrast", {"partitions": [1, 1, 1]}),
        ("global_contrast", {"partitions": [1, 4]}),
        ("local_contrast", {"strategy": "LX"}),
        ("local_contrast", {"blocks": 9}),
        ("local_contrast", {"blocks": 0}),
        ("local_contrast", {"region": 40}),
        ("local_contrast", {"freeze_encoder": "no"}),
        ("local_contrast", {"scale": [0, 1]}),
        ("global_local", {"mode": "both"}),
        ("global_local", {"switch": 1.0}),
        ("global_local", {"global_contrast": 3}),
        ("simclr", {"loss": "nce"}),
        ("simclr", {"temperature": 0.0}),
        ("simclr", {"size": [16, 16]}),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(name, options):
    with pytest.raises(MedclError, match=next(iter(options))):
        build(name, **options)


def test_options_of_a_part_are_checked_by_name():
    with pytest.raises(MedclError, match="temperatur"):
        build("global_local", global_contrast={"temperatur": 0.2})


@pytest.mark.parametrize("name", ["simclr", "global_contrast"])
def test_one_volume_is_too_few_where_volumes_are_compared(name):
    with pytest.raises(MedclError, match="2 different volumes"):
        build(name).check(volumes=1, batch_size=4)
    with pytest.raises(MedclError, match="batch_size"):
        build(name).check(volumes=4, batch_size=1)


def test_gd_minus_needs_one_volume_only():
    build("global_contrast", strategy="GD-").check(volumes=1, batch_size=1)


@pytest.mark.parametrize("size,region,along,count", [((8, 8, 8), 3, 3, 27), ((9, 4, 1), 3, 3, 6), ((5, 5, 5), 1, 2, 8)])
def test_regions_fill_a_map_of_any_size(size, region, along, count):
    corners, extent = region_corners(size, region, along)
    assert len(corners) == count == len(set(map(tuple, corners.tolist())))
    assert bool((corners >= 0).all()) and bool((corners + torch.tensor(extent) <= torch.tensor(size)).all())
    assert (corners.amax(0) + torch.tensor(extent)).tolist() == list(size) or 1 in size


def test_negatives_are_the_nearest_regions_in_mm_that_share_no_voxel():
    corners, extent = region_corners((9, 9, 5), 3, 3)
    spacing = (1.0, 1.0, 4.0)
    near = nearest_disjoint(corners, extent, spacing, 5)
    for u in range(len(corners)):
        rows = []
        for w in range(len(corners)):
            cells = [set(range(int(c), int(c) + k)) for c, k in zip(corners[u], extent, strict=True)]
            other = [set(range(int(c), int(c) + k)) for c, k in zip(corners[w], extent, strict=True)]
            if any(not (a & b) for a, b in zip(cells, other, strict=True)):
                rows.append((sum(((corners[u] - corners[w]) * torch.tensor(spacing)) ** 2) ** 0.5, w))
        chosen = {w for _, w in sorted(rows)[:5]}
        limit = sorted(rows)[4][0]
        mine = near[u].nonzero().flatten().tolist()
        assert len(mine) == 5 and all(dict((w, d) for d, w in rows)[w] <= limit for w in mine)
        assert {w for d, w in rows if d < limit} <= set(mine) and chosen


@pytest.mark.parametrize("moves", [{}, {"rotate_deg": 25.0, "scale": [0.7, 1.4]}], ids=["still", "moved"])
def test_regions_of_two_views_show_the_same_place(moves):
    """A smooth image: the values that the two views show at corresponding points are equal, and elsewhere are not."""
    task = build("local_contrast", intensity="none", region=2, **moves)
    axes = torch.meshgrid(*(torch.arange(32.0) for _ in range(3)), indexing="ij")
    image = (axes[0] * 1.0 + axes[1] * 40 + axes[2] * 1600)[None, None]
    batch = {"image": image.expand(3, -1, -1, -1, -1), "seed": torch.tensor([1, 2, 3]), "volume": torch.arange(3)}
    views = task.views({**batch, "place": torch.zeros(3)})
    points, inside = task.corresponding(views["matrix"], views["origin"])
    shown = []
    seen, edge = torch.ones_like(inside), 1.5 if moves else 0  # what lies between two voxels needs both
    for view in range(2):  # beyond the read's border the image repeats it, and is not linear
        own = map_to_view(points[:, view].flatten(1, 2), task.step, task.first)
        shown.append(sample_at(views["view"][:, view], own).view(*inside.shape, -1))
        place = own @ views["matrix"][:, view].mT + views["origin"][:, view, None]
        within = ((own >= 0) & (own <= 31) & (place >= edge) & (place <= 31 - edge)).all(-1)
        seen &= within.view(*inside.shape, -1).all(-1)
    checked = inside & seen
    assert checked.sum() >= 5
    torch.testing.assert_close(shown[0][checked], shown[1][checked], atol=16.0, rtol=0)  # a hundredth of a voxel
    if moves:
        assert float((points[:, 0] - points[:, 1]).abs().max()) > 1
        assert not bool(inside.all())


def test_a_frozen_encoder_stays_and_an_unfrozen_one_learns():
    for freeze in (True, False):
        task = build("local_contrast", freeze_encoder=freeze)
        assert task.trains == (("decoder",) if freeze else ("encoder", "decoder"))
        task.loss(task.views(batch_of(task, 2)))["loss"].backward()
        moved = [p.grad is not None for p in task.backbone.encoder_parameters()]
        assert any(moved) != freeze


def test_stages_follow_one_another_and_a_resumed_run_knows_its_stage():
    task = build("global_local")
    optimizer = torch.optim.AdamW(task.parameters(), 1e-2, weight_decay=0.5)

    def step(progress):
        optimizer.zero_grad()
        parts = task.loss(task.views(batch_of(task, 2)))
        parts["loss"].backward()
        optimizer.step()
        task.after_step(progress)
        return parts

    encoder = [p.detach().clone() for p in task.backbone.encoder_parameters()]
    decoder = {n: p.detach().clone() for n, p in task.backbone.named_parameters()}
    assert task.active() == ("global",)
    step(0.5)
    assert task.active() == ("local",)
    now = [p.detach().clone() for p in task.backbone.encoder_parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(encoder, now, strict=True) if a.ndim > 1)
    step(0.6)
    for a, b in zip(now, task.backbone.encoder_parameters(), strict=True):
        assert torch.equal(a, b)  # no gradient, no weight decay
    assert any(
        not torch.equal(decoder[n], p)
        for n, p in task.backbone.named_parameters()
        if not any(p is e for e in task.backbone.encoder_parameters())
    )
    again = build("global_local")
    again.load_state_dict(task.state_dict(), strict=True)
    assert again.active() == ("local",)
    assert sum(name.endswith("backbone.net.model.0.conv.unit0.conv.weight") for name in task.state_dict()) == 1

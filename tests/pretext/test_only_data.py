"""Pretext tasks, probes and diagnostics read nothing from voxels without data."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from partial_reads import reads_of

from medcl.losses.dense import propagate
from medcl.losses.voco import bases_with_data, overlap_labels
from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.networks.heads import pooled_pyramid, shares_inside, some_voxels
from medcl.pretext.registry import task_class
from medcl.store.plan import Plan
from medcl.transforms.inside import box_mask


def test_overlaps_count_voxels_of_the_volume():
    """Against counting them one by one."""
    grid, crop, canvas = (2, 3, 1), (4, 3, 5), (8, 9, 5)
    box = (torch.tensor([[1, 2, 0], [0, 4, 1]]), torch.tensor([[7, 5, 5], [3, 9, 4]]))
    real = box_mask(box, canvas)[:, 0]
    starts = torch.tensor([[[0, 0, 0], [3, 2, 0], [4, 6, 0]], [[1, 3, 0], [4, 6, 0], [0, 5, 0]]])
    labels = overlap_labels(starts.float(), torch.tensor(crop).float(), grid, box)
    usable = bases_with_data(torch.tensor(crop), grid, box)
    for row, k in itertools.product(range(2), range(3)):
        owned = torch.zeros(canvas, dtype=torch.bool)
        owned[tuple(slice(s, s + c) for s, c in zip(starts[row, k].tolist(), crop, strict=True))] = True
        owned &= real[row]
        for n, cell in enumerate(itertools.product(*map(range, grid))):
            base = torch.zeros(canvas, dtype=torch.bool)
            base[tuple(slice(i * c, (i + 1) * c) for i, c in zip(cell, crop, strict=True))] = True
            share = (owned & base).sum() / owned.sum().clamp(min=1)
            assert labels[row, k, n] == pytest.approx(float(share), abs=1e-6)
            assert bool(usable[row, n]) == bool((base & real[row]).any())
    assert usable.any() and not usable.all()


def test_pooling_counts_a_map_voxel_by_its_share_of_data():
    torch.manual_seed(0)
    features = [torch.randn(2, 3, 4, 4, 4), torch.randn(2, 5, 2, 2, 2)]
    inside = torch.zeros(2, 1, 8, 8, 8, dtype=torch.bool)
    inside[:, :, :5, :, 2:] = True
    pooled = pooled_pyramid(features, inside, "mean_deviation")
    assert torch.equal(pooled[:, :8], pooled_pyramid(features, inside))
    for row, (feature, side, first) in itertools.product(range(2), ((features[0], 2, 0), (features[1], 4, 3))):
        seen = [
            feature[row, :, i // side, j // side, k // side]
            for i, j, k in itertools.product(range(8), repeat=3)
            if inside[row, 0, i, j, k]
        ]
        last = first + feature.shape[1]
        torch.testing.assert_close(pooled[row, first:last], torch.stack(seen).mean(0))
        spread = torch.stack(seen).std(0, correction=0)
        torch.testing.assert_close(pooled[row, 8 + first : 8 + last], spread, atol=1e-5, rtol=1e-5)
    for pool in ("mean", "mean_deviation"):
        torch.testing.assert_close(pooled_pyramid(features, torch.ones_like(inside), pool),
                                   pooled_pyramid(features, None, pool))  # fmt: skip


def test_diagnostics_look_at_voxels_with_data():
    feature = torch.arange(2 * 24).view(2, 1, 2, 3, 4).float()
    inside = torch.zeros(2, 24, dtype=torch.bool)
    inside[0, 5:9], inside[1, :] = True, True
    rows = some_voxels(feature, 8, inside).view(2, 8)
    assert set(rows[0].tolist()) <= {5, 6, 7, 8} and len(set(rows[1].tolist())) == 8


PLAN = Plan(volume_size=(24, 24, 24), patch_size=(24, 24, 24), strides=((2, 2, 2),) * 2)
SMALL = {"hidden": 32, "embedding": 16}
COMPARED = [
    ("pixpro", {**SMALL, "size": [16, 16, 16], "blocks": 1}, "inside"),
    ("pixcontrast", {**SMALL, "size": [16, 16, 16]}, "inside"),
    ("local_contrast", {"size": [16, 16, 16], "region": 1, "regions": 3, "freeze_encoder": False}, "inside"),
    ("local_contrast", {"size": [16, 16, 16], "region": 1, "regions": 3, "freeze_encoder": False, "strategy": "LD",
                        "partitions": [1, 1, 2]}, "inside"),
    *(("voco", {**SMALL, "crops": 2, "grid": [3, 2, 1], "crop_size": [8, 8, 16], "variant": variant}, "usable")
      for variant in ("paper", "teacher", "v2")),
]  # fmt: skip


def task_and_batch(name, options):
    """A task and reads of which a third along the first axis lies beyond the volume."""
    torch.manual_seed(0)
    task = task_class(name)(build_backbone(BackboneSpec("unet", strides=PLAN.strides, width=4)), PLAN, options)
    reads = 3 * task.places.count
    batch = reads_of([[-8, 0, 0]] * reads, [[task.read_size[0] - 8, *task.read_size[1:]]] * reads, task.read_size)
    batch |= {"seed": torch.arange(reads), "volume": torch.arange(3).repeat_interleave(task.places.count)}
    return task, {**batch, "place": torch.arange(task.places.count).repeat(3)}


@pytest.mark.parametrize(("name", "options", "mark"), COMPARED, ids=lambda value: value if type(value) is str else "")
def test_embeddings_of_what_holds_no_data_have_no_say(name, options, mark):
    task, batch = task_and_batch(name, options)
    views = task.views(batch)
    torch.manual_seed(1)
    z, marks = task.embed(views)
    real = marks[mark] if mark in marks else views[mark]
    assert real.any() and not real.all()
    pairs, loss = task.pairs(views, z, marks), task.objective(z, marks)["loss"]
    assert loss > 0 or name == "pixpro"

    def changed(where):
        noisy = {}
        for key, rows in z.items():
            rows = rows.clone()
            if name == "voco":  # the base crops come after the random ones
                rows[:, options["crops"] :][where] += 5 * torch.randn(int(where.sum()), rows.shape[-1])
            else:
                both = where if where.ndim == 3 else where[:, None].expand(rows.shape[:3])
                rows[both] += 5 * torch.randn(int(both.sum()), rows.shape[-1])
            noisy[key] = rows
        return noisy

    without = changed(~real)
    torch.testing.assert_close(task.objective(without, marks)["loss"], loss)
    assert not torch.isclose(task.objective(changed(real), marks)["loss"], loss)
    other = task.pairs(views, without, marks)
    counted = (pairs.positive | pairs.negative).any(1)
    assert torch.equal(pairs.z[counted], other.z[counted])


def test_propagation_takes_nothing_from_voxels_without_data():
    torch.manual_seed(0)
    x, inside = torch.randn(2, 6, 4), torch.rand(2, 6) > 0.4
    noisy = torch.where(inside[..., None], x, torch.randn_like(x))
    one, other = (propagate(rows, 2 * rows, 2.0, inside) for rows in (x, noisy))
    torch.testing.assert_close(one[inside], other[inside])
    assert not torch.allclose(propagate(x, 2 * x, 2.0)[inside], propagate(noisy, 2 * noisy, 2.0)[inside])


@pytest.mark.parametrize("task_name", ["pixpro", "pixcontrast"])
def test_dense_maps_may_hold_anything_where_there_is_no_data(task_name, monkeypatch):
    task, batch = task_and_batch(task_name, {**SMALL, "size": [16, 16, 16], "blocks": 1})
    views, plain = task.views(batch), task._dense
    loss = task.objective(*task.embed(views))["loss"]

    def dense(*args):
        x, rows = plain(*args)
        return torch.where(views["inside"][..., None], x, torch.randn_like(x)), rows

    monkeypatch.setattr(task, "_dense", dense)
    torch.testing.assert_close(task.objective(*task.embed(views))["loss"], loss)


def test_shares_of_a_crop_are_those_of_its_voxels_in_the_volume():
    """Every voxel has a value of its own, and a crop shares as many with a base crop as they have in common."""
    options = {**SMALL, "crops": 8, "grid": [3, 1, 1], "crop_size": [8, 24, 24], "flip": 0.0, "intensity": "none"}
    task, _ = task_and_batch("voco", options)
    batch = reads_of([[-4, 0, 0]], [[13, 24, 24]], task.read_size)
    batch["image"] = torch.arange(math.prod(task.read_size)).float().view(1, 1, *task.read_size)
    views = task.views({**batch, "seed": torch.tensor([3]), "volume": torch.tensor([0])})
    bases = [set(b[i].tolist()) for b, i in zip(views["bases"][0], views["bases_inside"][0], strict=True)]
    counts = []
    for crop, inside, labels in zip(views["crops"][0], views["crops_inside"][0], views["labels"][0], strict=True):
        mine = set(crop[inside].tolist())
        counts.append(len(mine))
        assert labels.tolist() == pytest.approx([len(mine & other) / len(mine) for other in bases], abs=1e-6)
    assert views["usable"][0].tolist() == [True, True, True] and len(bases[2]) == 24 * 24
    assert min(counts) == max(counts) == 8 * 24 * 24


@pytest.mark.parametrize(
    ("name", "options"),
    [("simclr", {**SMALL, "size": [16, 16, 16]}), ("mae", {}), ("voco", {**SMALL, "crops": 2, "grid": [2, 2, 1]}),
     ("global_contrast", {**SMALL, "size": [16, 16, 8], "partitions": [1, 1, 2]})],
)  # fmt: skip
def test_pooled_features_are_of_voxels_with_data(name, options):
    """The first channel of a map that shows which voxels hold data averages to 1."""
    task, batch = task_and_batch(name, options)
    views = task.views(batch)
    inside = [value for key, value in views.items() if key.endswith("inside")]
    shown = torch.cat([each.flatten(0, each.ndim - 5) for each in inside]) if name != "voco" else torch.cat(
        [views["crops_inside"], views["bases_inside"]], dim=1).flatten(0, 1)  # fmt: skip
    assert not shown.all() and shown.any()
    sizes = task.backbone.reductions

    def encode(self, *args, **kwargs):
        maps = [torch.randn(len(shown), channels, *(n // r for n, r in zip(shown.shape[2:], reduction, strict=True)))
                for channels, reduction in zip(task.backbone.channels, sizes, strict=True)]  # fmt: skip
        for feature in maps:
            feature[:, 0] = (shares_inside(shown, feature.shape[2:]) > 0).float()[:, 0]
        return maps

    with torch.no_grad():
        keep = type(task.backbone).encode
        try:
            type(task.backbone).encode = encode
            features = task.embed(views)[1]["features"]
        finally:
            type(task.backbone).encode = keep
    has_data = shown.flatten(1).any(1)
    torch.testing.assert_close(features[has_data, 0], torch.ones(int(has_data.sum())))

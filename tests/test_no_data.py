"""Nothing is learnt where there is no data: beyond a volume, and beyond a read. Pretext tasks: `tests/pretext`."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from partial_reads import reads_of

from medcl.config import FinetuneConfig
from medcl.evaluation.probe import probe_data
from medcl.losses.segmentation import dice_ce
from medcl.networks.backbones import BackboneSpec, build_backbone
from medcl.segmentation.module import SegmentationModule
from medcl.segmentation.semi.registry import METHODS, build_method
from medcl.segmentation.semi.rows import Rows
from medcl.store.crops import CropDataset
from medcl.store.volumes import write_volume
from medcl.transforms.compose import Compose, StrongAugmentation, strong_augmentation
from medcl.transforms.inside import box_mask, data_box, inside_at, repeat_edge, starts_within, with_data
from medcl.transforms.margin import margin_for
from medcl.transforms.spatial import RandomSpatial, cut_margin


def garbage(batch):
    """The batch with other voxels, and other labels, wherever it lies outside its volume."""
    outside = ~box_mask(data_box(batch), batch["image"].shape[2:])
    assert outside.any() and not outside.all()
    generator = torch.Generator().manual_seed(5)
    noise = 1e3 * torch.randn(batch["image"].shape, generator=generator)
    other = {**batch, "image": torch.where(outside, noise, batch["image"])}
    if "label" in batch:
        values = torch.randint(0, 4, batch["label"].shape, generator=generator, dtype=torch.uint8)
        other["label"] = torch.where(outside, values, batch["label"])
    return other


def gradients(module, loss):
    for parameter in module.parameters():
        parameter.grad = None
    loss.backward()
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def assert_equal_gradients(one, other):
    assert any(g is not None and g.abs().sum() > 0 for g in one)
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.isfinite(a).all() and torch.equal(a, b)


class Trained(SegmentationModule):
    """The module without Lightning's trainer around it."""

    trainer = SimpleNamespace(global_step=5)  # type: ignore[assignment]

    def optimizers(self):  # type: ignore[override]
        return SimpleNamespace(param_groups=[{"lr": 0.0}])

    def log_dict(self, *args, **kwargs):
        pass


def labelled_batch(count, seed, size, labelled=True):
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "image": torch.randn(count, 1, *size, generator=generator),
        "seed": torch.arange(count) + 100 * seed,
        "start": torch.tensor([[-3, 2, -2], [4, -4, -2], [0, 0, 1]])[:count],
        "extent": torch.tensor([[20, 40, 14], [15, 16, 12], [24, 19, 12]])[:count],
    }
    if labelled:
        label = torch.randint(0, 3, (count, 1, 6, 6, 6), generator=generator).float()
        batch["label"] = torch.nn.functional.interpolate(label, size).to(torch.uint8)
    return batch


@pytest.mark.parametrize("semi", ["none", *METHODS])
@pytest.mark.parametrize("mix", ["none", "mixup", "cutmix"])
@pytest.mark.parametrize("dims", [2, 3])
def test_garbage_outside_the_volume_changes_no_gradient_of_fine_tuning(semi, mix, dims):
    torch.manual_seed(0)
    backbone = build_backbone(BackboneSpec("unet", 1, 3, ((2, 2, 3 - dims or 2),), 4, spatial_dims=dims))
    options = {"start": 0.0, "ramp": 0.1, **({} if semi == "mean_teacher" else {"threshold": 0.0})}
    method = build_method(semi, backbone, options if semi != "none" else {})
    config = FinetuneConfig("scans", "run", steps=10, mix=mix, core_tuning=0.1)
    margin = (4, 4, 2)
    augmentation = strong_augmentation("MR", (1.0, 1.0, 1.0), StrongAugmentation(flip=(0.5,) * 3), margin)
    module = Trained(backbone, None, config, augmentation, (1, 2), (1.0, 1.0, 1.0), semi=method)  # type: ignore[arg-type]
    size = (24, 24, 12)
    plain = {"labelled": labelled_batch(3, 1, size)}
    if method:
        plain["unlabelled"] = labelled_batch(2, 2, size, labelled=False)
    dirty = {part: garbage(batch) for part, batch in plain.items()}
    before = gradients(module, module.training_step(plain, 0))
    assert_equal_gradients(before, gradients(module, module.training_step(dirty, 0)))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_what_holds_no_data_is_not_mixed_in(kind):
    torch.manual_seed(0)
    n, size = 8, (10, 8, 6)
    label = torch.randint(0, 3, (n, 1, *size))
    target = torch.zeros(n, 3, *size).scatter_(1, label, 1.0)
    inside = (torch.rand(n, 1, *size) > 0.3).float()
    inside[0], inside[1] = 1.0, 0.0
    image = torch.randn(n, 1, *size)
    rows = Rows(image, target, inside, torch.arange(n), n, inside).mix(kind)
    whole = Rows(image, target, torch.ones_like(inside), torch.arange(n), n).mix(kind)
    partner = torch.arange(n).roll(-1)
    own, other = inside.bool(), inside[partner].bool()
    both, mixed_somewhere = own & other, (whole.image != image).any()
    assert mixed_somewhere
    assert torch.equal(rows.image[both], whole.image[both])
    assert torch.equal(rows.image[own & ~other], image[own & ~other])
    assert torch.equal(rows.weight > 0, rows.inside > 0) and not ((rows.inside > 0) & ~own & ~other).any()
    assert (rows.inside[own] == 1).all()
    torch.testing.assert_close(rows.target.sum(1), torch.ones(n, *size))
    theirs = (~own & other) & (rows.image != image)
    assert torch.equal(rows.image[theirs], image[partner][theirs])


def test_an_unmoved_patch_counts_where_the_volume_is_and_takes_its_label():
    size = (6, 5, 4)
    batch = {**reads_of([[-2, 1, 0], [0, 0, 3]], [[5, 9, 4], [6, 5, 5]], size), "seed": torch.arange(2)}
    batch["label"] = torch.randint(0, 3, (2, 1, *size), dtype=torch.uint8)
    backbone = build_backbone(BackboneSpec("unet", 1, 3, ((2, 2, 1),), 4))
    module = Trained(backbone, None, FinetuneConfig("s", "r"), None, (1, 2), (1, 1, 1))  # type: ignore[arg-type]
    rows = module.labelled_rows(batch)
    for row, i, j, k in itertools.product(range(2), *map(range, size)):
        place = batch["start"][row] + torch.tensor([i, j, k])
        there = bool(((place >= 0) & (place < batch["extent"][row])).all())
        assert rows.weight[row, 0, i, j, k] == rows.inside[row, 0, i, j, k] == there
        if there:
            assert rows.target[row, :, i, j, k].argmax() == batch["label"][row, 0, i, j, k]
            assert rows.image[row, 0, i, j, k] == batch["image"][row, 0, i, j, k]


def test_the_cross_entropy_is_a_mean_over_voxels_with_data():
    """The same whether a volume is padded or not."""
    torch.manual_seed(0)
    logits, label = torch.randn(1, 3, 4, 4, 6), torch.randint(0, 3, (1, 1, 4, 4, 6))
    target = torch.zeros_like(logits).scatter_(1, label, 1.0)
    inside = torch.zeros(1, 1, 4, 4, 6)
    inside[..., :2] = 1
    expected = dice_ce(logits[..., :2], target[..., :2])
    torch.testing.assert_close(dice_ce(logits, target, inside, inside), expected)


def test_where_a_read_holds_data():
    size = (8, 4, 3)
    reads = reads_of([[-2, 3, 0]], [[4, 6, 9]], size)
    box = data_box(reads)
    inside, filled = box_mask(box, size)[0, 0], repeat_edge(reads["image"], box)[0, 0]
    for i, j, k in itertools.product(range(8), range(4), range(3)):
        assert bool(inside[i, j, k]) == (0 <= i - 2 < 4 and 0 <= j + 3 < 6 and 0 <= k < 9)
        nearest = min(max(i, 2), 5), min(j, 2), k
        assert filled[i, j, k] == reads["image"][0, 0][nearest]
    where = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in size), indexing="ij"))[None]
    for shift in (-0.49, 0.0, 0.49):
        assert torch.equal(inside_at(where + shift, box)[0, 0], inside)
    whole = {"image": reads["image"]}
    assert box_mask(data_box(whole), size).all() and repeat_edge(whole["image"], data_box(whole)) is whole["image"]


def test_crops_lie_where_the_data_is():
    size, read = (4, 4, 4), (12, 12, 12)
    box = (torch.tensor([[0, 3, 5]]), torch.tensor([[12, 10, 7]]))
    draws = torch.rand(1, 4000, 3, generator=torch.Generator().manual_seed(0))
    starts = starts_within(draws, box, size, read)[0]
    ranges = [(axis.min().item(), axis.max().item()) for axis in starts.T]
    assert ranges == [(0, 8), (3, 6), (3, 5)]  # the third axis holds all of its two voxels in every crop


def test_a_margin_shows_what_lies_around_a_patch():
    """The same coordinates as without; what lay outside of the patch is the read's, and no longer the patch's edge."""
    size, margin = (12, 10, 8), (5, 6, 4)
    read = torch.randn(3, 1, *(n + 2 * m for n, m in zip(size, margin, strict=True)))
    label = (read > 0).long()
    seeds = torch.arange(3)
    wide = RandomSpatial(20.0, (0.7, 1.4), flip=(0.5,) * 3, p_affine=0.7, margin=margin)
    narrow = RandomSpatial(20.0, (0.7, 1.4), flip=(0.5,) * 3, p_affine=0.7)
    one, two = wide.draw(seeds, read.shape), narrow.draw(seeds, size)
    assert all(torch.equal(one[name], two[name]) for name in two)
    moved, moved_label = wide.apply_both(read, label, one)
    assert moved.shape[2:] == moved_label.shape[2:] == size
    middle, middle_label = cut_margin(read, margin), cut_margin(label, margin)
    old, old_label = narrow.apply_both(middle, middle_label, two)
    where = narrow.coordinates(two, size)
    last = torch.tensor(size).view(1, 3, 1, 1, 1) - 1
    inside = ((where >= 0) & (where <= last)).all(1, keepdim=True)
    assert 0.5 < inside.float().mean() < 1
    torch.testing.assert_close(moved[inside], old[inside], atol=5e-3, rtol=0)
    assert torch.equal(moved_label[inside], old_label[inside])
    assert (moved_label[~inside] != old_label[~inside]).float().mean() > 0.1


def test_the_margin_covers_what_augmentation_shows():
    size, spacing = (24, 20, 16), (1.0, 1.0, 2.0)
    bare = strong_augmentation("MR", spacing)
    shares = []
    for covered in (0.85, 0.95):
        margin = margin_for(bare, size, spacing, (99, 99, 99), covered)
        wide = strong_augmentation("MR", spacing, margin=margin)
        read = torch.ones(200, 1, *(n + 2 * m for n, m in zip(size, margin, strict=True)))
        seeds = torch.arange(1000, 1200)  # others than the margin was chosen by
        _, _, inside = wide.apply_soft(read, read, wide.draw(seeds, read.shape))
        shares.append(inside.float().mean().item())
    assert 0.83 < shares[0] < shares[1] and shares[1] > 0.93
    assert margin_for(bare, size, spacing, (3, -4, 0)) == (3, 0, 0)
    still = strong_augmentation("MR", spacing, dataclasses.replace(StrongAugmentation(), p_affine=0.0, p_elastic=0.0))
    assert margin_for(still, size, spacing, (99, 99, 99)) == (0, 0, 0)


@pytest.fixture
def thin(tmp_path):
    """A volume of 20 x 20 x 5 whose label tells its slices apart."""
    image = np.random.default_rng(0).standard_normal((20, 20, 5)).astype(np.float32)
    label = np.broadcast_to(np.arange(5) % 3, (20, 20, 5)).astype(np.uint8)
    points = {str(v): np.argwhere(label == v).tolist()[:50] for v in (1, 2)}
    write_volume(tmp_path / "thin", image, label, {"case": "thin", "spacing": [1, 1, 1], "foreground": points})
    return tmp_path / "thin"


def test_slices_of_a_thin_volume_are_taught_once(thin):
    """No two slices of a patch that hold data are equal, so none is taught two labels."""
    dataset = CropDataset([thin], (16, 16, 12), 0, labelled=True, foreground=0.5, margin=(2, 2, 0))
    patch = dataset[3]
    assert patch["image"].shape == patch["label"].shape == (1, 20, 20, 12)
    assert patch["extent"].tolist() == [20, 20, 5]
    image, inside = with_data({k: v[None] for k, v in patch.items()})
    slices = inside.flatten(0, 3).any(0)
    assert slices.sum() == 5 and torch.equal(slices.nonzero().flatten() + patch["start"][2], torch.arange(5))
    first = int(slices.nonzero()[0])
    assert torch.equal(image[..., first - 1], image[..., first])  # the repeated edge, that counts nothing


SOFT, HARD = {"threshold": 0.0, "hard": False}, {"threshold": 0.0, "hard": True}


@pytest.mark.parametrize(
    ("semi", "options"), [("mean_teacher", {}), *((name, how) for name in ("self_training", "pixel_contrast")
                                                  for how in (SOFT, HARD))]
)  # fmt: skip
def test_unlabelled_rows_count_where_the_volume_is_and_the_teacher_has_looked(semi, options):
    torch.manual_seed(0)
    method = build_method(semi, build_backbone(BackboneSpec("unet", 1, 3, ((2, 2, 2),), 4)), options)
    still = Compose([RandomSpatial(0.0, (1.0, 1.0), translate=[(0.25, 0.25), 0.0, 0.0], margin=(4, 2, 0))])
    image, inside = torch.randn(2, 1, 24, 20, 8), torch.ones(2, 1, 24, 20, 8, dtype=torch.bool)
    inside[..., :3] = False
    rows = method.rows(image, torch.arange(2), still, (1.0, 1.0, 1.0), inside)
    # moved by 4 of 16 voxels: the first ones show the margin, of which the teacher has said nothing
    expected = torch.zeros(2, 1, 16, 16, 8)
    expected[:, :, 4:, :, 3:] = 1
    assert torch.equal(rows.inside, expected) and torch.equal(rows.weight > 0, expected > 0)
    torch.testing.assert_close(rows.image, image[:, :, :16, 2:-2], atol=1e-3, rtol=0)


def test_a_probe_tells_no_class_beyond_the_volume(thin):
    data = probe_data([("a", thin)], [1, 2], (16, 16, 12))
    start = torch.tensor([0, 0, -3])
    for voxels, kinds, shares in zip(data.voxels, data.classes, data.shares, strict=True):
        place = voxels[:, 2] + start[2]
        assert ((place >= 0) & (place < 5)).all() and torch.equal(kinds, (place % 3).long())
        torch.testing.assert_close(shares, torch.tensor([2 / 5, 2 / 5, 1 / 5]))

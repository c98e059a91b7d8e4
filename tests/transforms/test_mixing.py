"""Mixup and CutMix: planted boxes, exact shares, and the soft maps that move with an image."""

from __future__ import annotations

import pytest
import torch

from medcl.losses.segmentation import shares
from medcl.segmentation.semi.rows import Rows
from medcl.transforms.compose import Compose, StrongAugmentation, strong_augmentation
from medcl.transforms.mixing import draw_shares, mixed, partners
from medcl.transforms.spatial import RandomSpatial

SHAPE = (12, 10, 8)


def rows(labelled: int, unlabelled: int) -> Rows:
    """Every row has its own grey value, class and weight, so that a voxel tells where it came from."""
    n = labelled + unlabelled
    own = torch.arange(n).view(-1, 1, 1, 1, 1).expand(n, 1, *SHAPE)
    weight = torch.where(own < labelled, 1.0, 0.25)
    return Rows(own.float(), shares(own, n), weight, torch.arange(n) + 106, labelled)


@pytest.mark.parametrize("labelled,unlabelled", [(4, 0), (4, 2), (2, 2)])
def test_label_weight_and_image_of_a_cutmix_are_cut_along_the_same_box(labelled, unlabelled):
    before, changed = rows(labelled, unlabelled), 0
    after = before.mix("cutmix")
    partner = partners(labelled, unlabelled)
    for i in range(labelled + unlabelled):
        foreign = after.image[i, 0] != i
        changed += bool(foreign.any())
        assert (after.image[i, 0][foreign] == partner[i]).all()
        assert torch.equal(after.target[i].argmax(0), after.image[i, 0].long())
        assert torch.equal(after.target[i].sum(0), torch.ones(SHAPE))
        assert torch.equal(after.weight[i, 0], torch.where(after.image[i, 0] < labelled, 1.0, 0.25))
        where = foreign.nonzero()
        if len(where):  # a full box
            sides = where.amax(0) - where.amin(0) + 1
            assert int(sides.prod()) == len(where)
    assert changed > 0


def test_a_pasted_pseudo_label_weighs_what_pseudo_labels_are_trusted_so_far():
    """Into labelled rows, whose loss does not ramp up; unlabelled rows, whose loss does, keep their weights."""
    before = rows(4, 2)
    whole, half, none = (before.mix("cutmix", trust).weight for trust in (1.0, 0.5, 0.0))
    pasted = whole[:4] == 0.25
    assert pasted.any() and (half[:4][pasted] == 0.125).all() and (none[:4][pasted] == 0).all()
    assert (half[:4][~pasted] == 1).all() and (none[:4][~pasted] == 1).all()
    assert torch.equal(half[4:], whole[4:]) and torch.equal(none[4:], whole[4:])
    alone = rows(4, 0)
    assert torch.equal(alone.mix("cutmix", 0.0).weight, alone.weight)


def test_labelled_and_unlabelled_rows_are_each_others_partners():
    assert partners(4, 2).tolist() == [4, 5, 4, 5, 0, 1]
    assert partners(3, 0).tolist() == [1, 2, 0] and partners(0, 2).tolist() == [1, 0]


def test_mixup_mixes_labelled_rows_only_and_labels_as_images():
    before = rows(4, 2)
    after = before.mix("mixup")
    share = draw_shares(before.seed[:4], "mixup", SHAPE)
    assert 0 < share.max() <= 0.5 and (share == 0).any()
    for i in range(4):
        a = float(share[i])
        assert torch.allclose(after.image[i], before.image[i] * (1 - a) + before.image[(i + 1) % 4] * a)
        assert torch.allclose(after.target[i], before.target[i] * (1 - a) + before.target[(i + 1) % 4] * a)
    assert torch.equal(after.image[4:], before.image[4:]) and torch.equal(after.target[4:], before.target[4:])


def test_a_box_takes_up_the_share_that_was_drawn_and_lies_anywhere():
    seeds = torch.arange(4000)
    boxes = draw_shares(seeds, "cutmix", (32, 32, 32), probability=1.0)
    share = boxes.mean((1, 2, 3, 4))
    assert share.mean() == pytest.approx(0.5, abs=0.02)  # Beta(1, 1)
    assert torch.histc(share, 4, 0, 1).div(4000).sub(0.25).abs().max() < 0.05
    # mirror-symmetric in distribution
    assert boxes.mean((0, 1, 3, 4)).sub(boxes.mean((0, 1, 3, 4)).flip(0)).abs().max() < 0.03
    assert draw_shares(seeds, "cutmix", (8, 8, 8)).amax((1, 2, 3, 4)).mean() == pytest.approx(0.5, abs=0.05)


def test_the_share_of_a_sample_depends_on_its_own_seed_alone():
    whole = draw_shares(torch.arange(6), "cutmix", SHAPE)
    assert torch.equal(whole[2:4], draw_shares(torch.arange(2, 4), "cutmix", SHAPE))


def test_mixing_by_one_and_zero_is_exact():
    x = torch.randn(2, 1, 3, 3, 3)
    share = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1, 1)
    assert torch.equal(mixed(x, share, torch.tensor([1, 0])), x[[1, 1]])


def test_soft_maps_move_as_the_image_does_and_the_outside_is_told():
    augmentation = strong_augmentation("MR", (1.0, 1.0, 2.0), StrongAugmentation(flip=(0.5, 0.5, 0.5)))
    geometry = Compose(augmentation.transforms[:1])
    image, seeds = torch.randn(6, 1, *SHAPE), torch.arange(6)
    params = augmentation.draw(seeds, image.shape)
    soft = torch.cat([image, 1 - image], dim=1)  # so that the maps are known wherever they go
    moved_image, moved, inside = augmentation.apply_soft(image, soft, params)
    assert torch.equal(moved_image, augmentation.apply(image, params))
    alone = geometry.apply(image, params[:1])
    assert torch.allclose(moved[:, :1], alone, atol=1e-6) and torch.allclose(moved.sum(1), torch.ones(6, *SHAPE))
    where = augmentation.coordinates(params, SHAPE)
    edge = torch.tensor(SHAPE).view(1, 3, 1, 1, 1) - 1
    surely_in = ((where > 0) & (where < edge)).all(1, keepdim=True)
    surely_out = ((where < -0.6) | (where > edge + 0.6)).any(1, keepdim=True)
    assert inside[surely_in].all() and not inside[surely_out].any() and surely_out.any()


def test_soft_maps_follow_a_mirror_exactly():
    mirror = Compose([RandomSpatial(0.0, (1.0, 1.0), flip=(1.0, 0.0, 0.0), p_affine=0.0)])
    image = torch.randn(1, 1, *SHAPE)
    soft = torch.rand(1, 3, *SHAPE)
    _, moved, inside = mirror.apply_soft(image, soft, mirror.draw(torch.tensor([3]), SHAPE))
    assert torch.equal(moved, soft.flip(2)) and inside.all()

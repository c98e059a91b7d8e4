"""Spatial transforms do what slow independent references say: places, turns, growth, labels, bending."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_images import SEEDS, SHAPE, smooth_blob, volumes
from scipy import ndimage, stats

from medcl.transforms import (
    Compose,
    RandomNoise,
    RandomSpatial,
)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 1.0, 0.8)])
def test_resampling_is_scipys_map_coordinates(spacing: tuple[float, ...]) -> None:
    image, label = volumes()
    transform = RandomSpatial(
        shear=0.2, translate=0.1, flip=(0.5,) * 3, elastic=(5, 2), p_elastic=1, label_padding="border"
    )
    params = transform.draw(SEEDS, SHAPE, spacing)
    where = transform.coordinates(params, SHAPE).numpy()
    out, moved = transform.apply_both(image, label, params)
    # positions halfway between voxels may round either way
    clear = (np.abs(where - np.floor(where) - 0.5) > 1e-3).all(axis=1)
    for b in range(len(image)):
        expected = ndimage.map_coordinates(image[b, 1].numpy(), where[b], order=1, mode="nearest")
        np.testing.assert_allclose(out[b, 1].numpy(), expected, atol=2e-4)
        near = ndimage.map_coordinates(label[b, 0].numpy(), where[b], order=0, mode="nearest")
        inside = clear[b] & ((where[b] > 0) & (where[b] < np.array(SHAPE)[:, None, None, None] - 1)).all(axis=0)
        np.testing.assert_array_equal(moved[b, 0].numpy()[inside], near[inside])


def test_coordinates_say_what_was_sampled() -> None:
    ramp = torch.from_numpy(np.indices(SHAPE)).float()[None].expand(6, -1, -1, -1, -1)
    transform = RandomSpatial(shear=0.1, flip=(0.5,) * 3, elastic=(5, 2), p_affine=0.6, p_elastic=0.6)
    params = transform.draw(SEEDS, SHAPE)
    assert not params["warped"].all(), "a seed without interpolation belongs to this test"
    where = transform.coordinates(params, SHAPE)
    last = torch.tensor(SHAPE).reshape(3, 1, 1, 1) - 1
    torch.testing.assert_close(transform.apply(ramp, params), where.clamp(min=0).minimum(last), rtol=0, atol=1e-3)
    chain = Compose([RandomNoise(), transform])
    drawn = chain.draw(SEEDS, SHAPE)
    torch.testing.assert_close(chain.coordinates(drawn, SHAPE), transform.coordinates(drawn[1], SHAPE))
    with pytest.raises(ValueError):
        Compose([RandomNoise()]).coordinates(drawn[:1], SHAPE)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_quarter_turn_is_rot90(axis: int) -> None:
    image, label = volumes(2, (9, 9, 9))
    ranges: list[float | tuple[float, float]] = [0.0, 0.0, 0.0]
    ranges[axis] = (90.0, 90.0)
    out, moved = RandomSpatial(ranges, (1.0, 1.0))(image, torch.tensor([1, 2]), label)
    plane = [(axis + 1) % 3 + 2, (axis + 2) % 3 + 2]
    torch.testing.assert_close(out, torch.rot90(image, 1, plane), rtol=0, atol=1e-4)
    assert torch.equal(moved, torch.rot90(label, 1, plane))


def test_flips_alone_are_exact() -> None:
    image, label = volumes()
    out, moved = RandomSpatial(flip=(0.0, 1.0, 1.0), p_affine=0)(image, SEEDS, label)
    assert torch.equal(out, image.flip(3, 4)) and torch.equal(moved, label.flip(3, 4))
    drawn = RandomSpatial(flip=(0.0, 0.3, 1.0), p_affine=0).draw(torch.arange(3000), SHAPE)["flip"].float().mean(0)
    torch.testing.assert_close(drawn, torch.tensor([0.0, 0.3, 1.0]), rtol=0, atol=0.03)


def test_scale_is_growth() -> None:
    blob = smooth_blob((32, 32, 32), (15.5, 15.5, 15.5))
    out = RandomSpatial(0.0, (1.4, 1.4))(blob, torch.tensor([1]))
    assert abs(out.sum() / blob.sum() / 1.4**3 - 1) < 0.03
    scale = RandomSpatial(0.0, (0.7, 1.4)).draw(torch.arange(4000), SHAPE)["matrix"][:, 0, 0]
    assert stats.kstest(-np.log(scale.numpy()), "uniform", (math.log(0.7), math.log(2))).pvalue > 1e-3


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_the_label_follows_the_image(mode: str) -> None:
    shape, centre = (32, 30, 28), (18.0, 13.0, 15.0)
    blob = smooth_blob(shape, centre)
    image, label = blob.expand(12, -1, -1, -1, -1), (blob > 0.4).to(torch.uint8).expand(12, -1, -1, -1, -1)
    transform = RandomSpatial(flip=(0.5,) * 3, elastic=(10, 3), p_elastic=0.5, label_mode=mode)  # type: ignore[arg-type]
    out, moved = transform(image, torch.arange(12), label)
    grid = np.indices(shape).reshape(3, -1)
    for x, y in zip(out, moved, strict=True):
        core = x.flatten().numpy() * (x.flatten().numpy() > 0.4)
        at = (grid * core).sum(1) / core.sum()
        label_at = grid[:, y.flatten().numpy() > 0].mean(1)
        assert np.abs(at - label_at).max() < 0.5
        agree = 2 * ((x > 0.4) & (y > 0)).sum() / ((x > 0.4).sum() + (y > 0).sum())
        assert agree > 0.85


def test_linear_labels_take_the_largest_share() -> None:
    _, label = volumes(3)
    label = ndimage.median_filter(label.numpy(), (1, 1, 3, 3, 3))
    transform = RandomSpatial(label_mode="linear")
    params = transform.draw(torch.tensor([1, 2, 3]), SHAPE)
    target = torch.from_numpy(label)
    _, moved = transform.apply_both(target.float(), target, params)
    where = transform.coordinates(params, SHAPE).numpy()
    for b in range(3):
        share = np.stack([ndimage.map_coordinates((label[b, 0] == v) * 1.0, where[b], order=1) for v in range(4)])
        inside = ((where[b] > 0) & (where[b] < np.array(SHAPE)[:, None, None, None] - 1)).all(axis=0)
        top = np.sort(share, axis=0)
        inside &= top[-1] - top[-2] > 1e-3
        np.testing.assert_array_equal(moved[b, 0].numpy()[inside], share.argmax(axis=0)[inside])


@given(st.tuples(*[st.floats(0.5, 1.4)] * 3), st.integers(0, 2**60))
@settings(max_examples=40, deadline=None)
def test_rotations_are_rigid_in_mm(spacing: tuple[float, float, float], seed: int) -> None:
    params = RandomSpatial(30.0, (1.0, 1.0)).draw(torch.tensor([seed]), SHAPE, spacing)
    mm = torch.tensor(spacing)
    physical = params["matrix"][0] * mm[:, None] / mm
    torch.testing.assert_close(physical @ physical.T, torch.eye(3), rtol=0, atol=1e-5)
    assert torch.linalg.det(physical) > 0


def test_strongly_anisotropic_volumes_keep_their_slices() -> None:
    transform = RandomSpatial(shear=0.2, elastic=(8, 3), p_elastic=1, flip=(1.0, 0.0, 0.0))
    where = transform.coordinates(transform.draw(SEEDS, SHAPE, (5.0, 1.0, 1.0)), SHAPE)
    slices = torch.arange(SHAPE[0] - 1, -1, -1.0)[:, None, None].expand(*SHAPE)
    torch.testing.assert_close(where[:, 0], slices.expand(6, -1, -1, -1), rtol=0, atol=1e-4)
    assert (where[:, 1:].std((2, 3, 4)) > 1).all()
    mixed = transform.coordinates(transform.draw(SEEDS, SHAPE, (2.5, 1.0, 1.0)), SHAPE)
    assert ((mixed[:, 0] - slices).abs() > 0.2).any()
    forced = RandomSpatial(in_plane=True).draw(SEEDS, SHAPE, (1.0, 1.0, 1.2))["matrix"]
    torch.testing.assert_close(forced[:, 2], torch.tensor([0.0, 0.0, 1.0]).expand(6, -1), rtol=0, atol=1e-6)


@given(st.integers(0, 2**60), st.integers(5, 12))
@settings(max_examples=25, deadline=None)
def test_elastic_deformation_bends_within_its_bound_and_never_folds(seed: int, distance: int) -> None:
    most = 0.4 * distance
    transform = RandomSpatial(elastic=(distance, most), p_affine=0, p_elastic=1)
    where = transform.coordinates(transform.draw(torch.tensor([seed]), (20, 20, 20)), (20, 20, 20))[0].double()
    moved = where - torch.from_numpy(np.indices((20, 20, 20)))
    assert 0 < moved.abs().max() <= most + 1e-4
    gradient = torch.stack([torch.stack(torch.gradient(where[axis])) for axis in range(3)]).permute(2, 3, 4, 0, 1)
    assert (torch.linalg.det(gradient) > 0).all()


def test_shift_moves_what_is_seen_by_its_fraction() -> None:
    blob = smooth_blob((20, 20, 20), (10, 10, 10), 1.5)
    out = RandomSpatial(0.0, (1.0, 1.0), translate=[(0.1, 0.1), (0.0, 0.0), (-0.2, -0.2)])(blob, torch.tensor([0]))
    torch.testing.assert_close(out, smooth_blob((20, 20, 20), (12, 10, 6), 1.5), rtol=0, atol=1e-3)


# chains and presets

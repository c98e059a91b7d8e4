"""Blocks of a volume and the error of hidden ones, against loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from medcl.losses import masked


@pytest.mark.parametrize("shape,block", [((2, 1, 4, 6, 2), (2, 3, 1)), ((1, 2, 6, 2, 4), (3, 2, 2))])
def test_blocks_are_the_slices_they_say(shape, block):
    volume = torch.arange(math.prod(shape)).float().view(shape)
    blocks = masked.to_blocks(volume, block)
    counts = [n // b for n, b in zip(shape[2:], block, strict=True)]
    for number, place in enumerate(itertools.product(*map(range, counts))):
        cell = volume[(slice(None), slice(None), *(slice(p * b, p * b + b) for p, b in zip(place, block, strict=True)))]
        assert torch.equal(blocks[:, number], cell.flatten(1))
    which = torch.tensor([[2, 0]]).repeat(shape[0], 1)
    assert torch.equal(masked.chosen_blocks(volume, block, which), blocks[:, [2, 0]])


# ---- errors ----------------------------------------------------------------------------------------------------------


def reference_loss(prediction, target, inside, kind, normalise):
    """Voxel by voxel in python floats."""
    samples = []
    for b in range(len(target)):
        terms = []
        for k in range(target.shape[1]):
            real = [v for v in range(target.shape[2]) if inside[b, k, v]]
            values = {v: float(target[b, k, v]) for v in real}
            if normalise == "block" and real:
                mean = sum(values.values()) / len(real)
                deviation = math.sqrt(sum((x - mean) ** 2 for x in values.values()) / len(real) + 1e-6)
                values = {v: (x - mean) / deviation for v, x in values.items()}
            for v in real:
                gap = float(prediction[b, k, v]) - values[v]
                terms.append(gap**2 if kind == "mse" else abs(gap))
        samples.append(sum(terms) / len(terms) if terms else 0.0)
    return sum(samples) / len(samples)


@pytest.mark.parametrize("kind", ["mse", "l1"])
@pytest.mark.parametrize("normalise", ["none", "block"])
@pytest.mark.parametrize("shape", [(1, 2, 5), (3, 4, 8), (2, 1, 27)])
def test_the_loss_equals_a_loop_over_voxels(shape, kind, normalise):
    torch.manual_seed(sum(shape))
    prediction, target = torch.randn(shape), 3 * torch.randn(shape) + 1
    inside = torch.rand(shape) > 0.3
    inside[-1] &= shape[0] == 1  # a sample of padding alone, where there are several
    ours = masked.reconstruction_loss(prediction, target, inside, kind, normalise)
    assert float(ours) == pytest.approx(reference_loss(prediction, target, inside, kind, normalise), rel=1e-5)


def test_a_perfect_prediction_costs_nothing_and_a_constant_one_the_variance():
    target, inside = torch.randn(2, 3, 8), torch.ones(2, 3, 8, dtype=torch.bool)
    assert float(masked.reconstruction_loss(target.clone(), target, inside)) == 0
    level = target.flatten(1).mean(1).view(2, 1, 1).expand_as(target)
    variance = target.flatten(1).var(1, unbiased=False).mean()
    assert float(masked.reconstruction_loss(level, target, inside)) == pytest.approx(float(variance), rel=1e-5)
    assert float(masked.reconstruction_loss(0 * target, target, inside, normalise="block")) == pytest.approx(1, 1e-3)


def test_a_block_of_one_grey_value_normalises_to_zero():
    scaled = masked.block_normalised(torch.full((1, 1, 8), 7.0), torch.ones(1, 1, 8, dtype=torch.bool))
    assert torch.equal(scaled, torch.zeros(1, 1, 8))


def test_the_best_constant_is_that_of_the_seen_voxels():
    image = torch.tensor([[1.0, 2.0, 9.0, 50.0], [3.0, 4.0, 5.0, 6.0]])
    seen = torch.tensor([[True, True, True, False], [False] * 4])
    assert masked.level_of(image, seen).tolist() == [4.0, 0.0]
    assert masked.level_of(image, seen, "l1").tolist() == [2.0, 0.0]


def test_interpolation_grows_from_the_seen_voxels_shell_by_shell():
    rng = np.random.default_rng(0)
    image, seen = rng.normal(size=(4, 5, 3)), rng.random((4, 5, 3)) < 0.1
    values = {tuple(p): float(image[tuple(p)]) for p in np.argwhere(seen)}
    while len(values) < image.size:
        new = {}
        for place in itertools.product(*map(range, image.shape)):
            near = [values[q] for q in itertools.product(*(range(c - 1, c + 2) for c in place)) if q in values]
            if place not in values and near:
                new[place] = sum(near) / len(near)
        values |= new
    wanted = np.array([values[p] for p in itertools.product(*map(range, image.shape))]).reshape(image.shape)
    unseen_is_wrong = torch.from_numpy(np.where(seen, image, 123.0))[None, None]
    found = masked.interpolated(unseen_is_wrong, torch.from_numpy(seen)[None, None])
    np.testing.assert_allclose(found[0, 0].numpy(), wanted, atol=1e-6)
    nothing = torch.zeros(1, 1, 3, 3, 3, dtype=torch.bool)
    assert torch.equal(masked.interpolated(torch.ones(1, 1, 3, 3, 3), nothing), torch.zeros(1, 1, 3, 3, 3))

"""Segmentation losses against MONAI's, slow loops and planted voxels."""

from __future__ import annotations

import math

import pytest
import torch
from monai.losses import DiceCELoss

from medcl.losses.segmentation import consistency, dice_ce, ramp_up, shares


def some(classes: int = 3, n: int = 2):
    torch.manual_seed(0)
    logits = torch.randn(n, classes, 4, 5, 3)
    return logits, torch.randint(0, classes, (n, 1, 4, 5, 3))


def slow(logits, target, weight):
    """The definition, voxel by voxel."""
    n, classes = logits.shape[:2]
    p = torch.softmax(logits.double(), 1)
    overlap, total = [0.0] * classes, [0.0] * classes
    entropy, count = 0.0, 0
    for b in range(n):
        for x in range(4):
            for y in range(5):
                for z in range(3):
                    w = float(weight[b, 0, x, y, z])
                    count += 1
                    for c in range(classes):
                        q, t = float(p[b, c, x, y, z]), float(target[b, c, x, y, z])
                        entropy -= w * t * math.log(q)
                        overlap[c] += w * q * t
                        total[c] += w * (q + t)
    dice = [(2 * overlap[c] + 1e-5) / (total[c] + 1e-5) for c in range(1, classes)]
    return sum(1 - d for d in dice) / len(dice) + entropy / count


@pytest.mark.parametrize("classes", [2, 4])
def test_labels_without_weights_give_monais_loss(classes):
    logits, label = some(classes)
    wanted = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)(logits, label)
    assert dice_ce(logits, shares(label, classes)) == pytest.approx(float(wanted), abs=1e-6)
    assert dice_ce(logits, shares(label, classes), torch.ones(2, 1, 4, 5, 3)) == pytest.approx(float(wanted), abs=1e-6)


def test_weights_and_mixed_labels_follow_the_definition():
    logits, _ = some()
    target = torch.softmax(torch.randn(2, 3, 4, 5, 3), 1)
    target[:, 0] += target[:, 2]
    target[:, 2] = 0  # a class that is nowhere
    weight = torch.rand(2, 1, 4, 5, 3).round(decimals=1)
    assert dice_ce(logits, target, weight) == pytest.approx(slow(logits, target, weight), rel=1e-5)


def test_a_voxel_of_no_weight_has_no_gradient_and_no_say():
    logits, label = some()
    weight = torch.ones(2, 1, 4, 5, 3)
    weight[0, 0, 1, 2, 0] = 0
    logits.requires_grad_(True)
    for loss in (
        dice_ce(logits, shares(label, 3), weight),
        consistency(logits, torch.softmax(torch.randn(2, 3, 4, 5, 3), 1), weight),
    ):
        (gradient,) = torch.autograd.grad(loss, logits)
        assert (gradient[0, :, 1, 2, 0] == 0).all() and (gradient[0, :, 0, 0, 0] != 0).any()
    other = label.clone()
    other[0, 0, 1, 2, 0] = (label[0, 0, 1, 2, 0] + 1) % 3
    assert dice_ce(logits, shares(other, 3), weight) == dice_ce(logits, shares(label, 3), weight)


def test_trusted_background_alone_does_not_teach_that_there_is_nothing_else():
    """The Dice of a class that no trusted voxel has is as good as constant."""
    logits, label = some()
    logits.requires_grad_(True)
    weight = (label == 0).float()
    (gradient,) = torch.autograd.grad(dice_ce(logits, shares(label, 3), weight), logits)
    entropy = (torch.softmax(logits, 1) - shares(label, 3)) * weight / label.numel()  # what cross-entropy alone gives
    assert torch.allclose(gradient, entropy, atol=1e-5)


def test_nothing_trusted_is_no_loss_and_no_nan():
    logits, label = some()
    logits.requires_grad_(True)
    none = torch.zeros(2, 1, 4, 5, 3)
    for loss in (dice_ce(logits, shares(label, 3), none), consistency(logits, shares(label, 3), none)):
        assert float(loss) == 0
        assert (torch.autograd.grad(loss, logits)[0] == 0).all()


def test_consistency_is_the_mean_squared_difference_of_what_was_seen():
    logits, _ = some()
    target = torch.softmax(torch.randn(2, 3, 4, 5, 3), 1)
    inside = (torch.rand(2, 1, 4, 5, 3) < 0.6).float()
    chosen = inside.expand(-1, 3, -1, -1, -1).bool()
    wanted = (torch.softmax(logits, 1) - target)[chosen].square().mean()
    assert consistency(logits, target, inside) == pytest.approx(float(wanted), rel=1e-5)


def test_the_ramp():
    assert ramp_up(0.0, 0.4) == pytest.approx(math.exp(-5)) and ramp_up(0.2, 0.4) == pytest.approx(math.exp(-1.25))
    assert ramp_up(0.4, 0.4) == ramp_up(0.9, 0.4) == ramp_up(0.0, 0.0) == 1

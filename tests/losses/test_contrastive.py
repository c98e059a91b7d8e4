"""The contrastive primitive and what is built of masks alone, against loops over pairs and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from medcl.losses.contrastive import contrast, cosine
from medcl.losses.global_contrast import global_masks
from medcl.losses.local_contrast import local_loss, local_masks
from medcl.pretext.simclr import concentration_weights, masks

T = 0.1


def similarity(a, b, t=T):
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm())) / t


def loop(z, positive, negative, t=T):
    """Mean over positive pairs of -log(e^p / (e^p + sum of e^n)), pair by pair."""
    terms = []
    for i in range(len(z)):
        for p in range(len(z)):
            if positive(i, p):
                others = sum(math.exp(similarity(z[i], z[n], t)) for n in range(len(z)) if negative(i, n))
                own = math.exp(similarity(z[i], z[p], t))
                terms.append(-math.log(own / (own + others)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("n,d", [(4, 3), (7, 16), (12, 5)])
def test_the_primitive_equals_a_loop_over_any_masks(n, d):
    torch.manual_seed(n)
    z = torch.randn(n, d)
    kind = torch.randint(0, 3, (n, n))
    kind[0] = 1  # an anchor without a positive, and one without a negative
    kind[1] = 0
    ours = contrast(z, z, kind == 0, kind == 1, T)
    assert float(ours) == pytest.approx(loop(z, lambda i, p: kind[i, p] == 0, lambda i, p: kind[i, p] == 1), rel=1e-5)


def test_rows_and_columns_may_be_different_things_and_come_in_batches():
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, 6), torch.randn(3, 5, 6)
    positive = torch.rand(3, 4, 5) > 0.6
    whole = contrast(a, b, positive, ~positive, T)
    terms, count = 0.0, 0
    for row in range(3):
        pairs = int(positive[row].sum())
        terms += float(contrast(a[row], b[row], positive[row], ~positive[row], T)) * pairs
        count += pairs
    assert float(whole) == pytest.approx(terms / count, rel=1e-5)


@pytest.mark.parametrize("negatives", [1, 5, 100])
def test_closed_forms_at_the_trivial_solutions(negatives):
    n = negatives + 2
    positive, negative = torch.zeros(2, n, n, dtype=torch.bool)
    positive[0, 1], negative[0, 2:] = True, True
    same = contrast(torch.ones(n, 3), torch.ones(n, 3), positive, negative, T)
    assert float(same) == pytest.approx(math.log(1 + negatives), rel=1e-5)
    apart = torch.eye(n)
    apart[1] = apart[0]
    best = contrast(apart, apart, positive, negative, T)
    assert float(best) == pytest.approx(math.log(1 + negatives * math.exp(-1 / T)), rel=1e-4)


def test_lengths_do_not_matter():
    torch.manual_seed(0)
    z = torch.randn(6, 4)
    positive = torch.rand(6, 6) > 0.5
    one = contrast(z, z, positive, ~positive, T)
    other = contrast(z * torch.rand(6, 1).add(0.1), z * 100, positive, ~positive, T)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("temperature", [0.001, 0.01])
def test_low_temperatures_stay_finite_with_their_gradient(temperature):
    z = torch.randn(8, 4, requires_grad=True)
    positive, negative = masks(torch.arange(4))
    for decoupled in (False, True):
        loss = contrast(z, z, positive, negative, temperature, decoupled=decoupled)
        (gradient,) = torch.autograd.grad(loss, z)
        assert bool(loss.isfinite()) and bool(gradient.isfinite().all())


@pytest.mark.parametrize("temperature", [0, -1, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        contrast(torch.ones(2, 2), torch.ones(2, 2), torch.eye(2) > 0, torch.eye(2) == 0, temperature)


def test_nothing_to_pair_costs_nothing():
    z = torch.randn(4, 3, requires_grad=True)
    none = torch.zeros(4, 4, dtype=torch.bool)
    for decoupled in (False, True):
        loss = contrast(z, z, none, ~none, T, decoupled=decoupled)
        loss.backward()
        assert float(loss.detach()) == 0
    assert not z.grad.any()


def test_cosines_are_float32_under_autocast():
    z = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cosine(z, z), cosine(z, z).float()) and cosine(z, z).dtype == torch.float32


@pytest.mark.parametrize("n,d", [(2, 4), (3, 8), (6, 5)])
def test_simclr_is_nt_xent(n, d):
    """Chen et al. 2020, equation 1: cross-entropy over all views but the anchor itself."""
    torch.manual_seed(n)
    z = torch.randn(2 * n, d)
    terms = []
    for i in range(2 * n):
        partner = i + 1 if i % 2 == 0 else i - 1
        own = similarity(z[i], z[partner])
        every = sum(math.exp(similarity(z[i], z[k])) for k in range(2 * n) if k != i)
        terms.append(-own + math.log(every))
    ours = contrast(z, z, *masks(torch.arange(n)), T)
    assert float(ours) == pytest.approx(sum(terms) / (2 * n), rel=1e-5)


@pytest.mark.parametrize("n,d", [(2, 4), (3, 8), (6, 5)])
def test_decoupled_contrast_leaves_the_positive_out(n, d):
    torch.manual_seed(n)
    z = torch.randn(2 * n, d)
    positive, negative = masks(torch.arange(n))
    weights = concentration_weights(z, positive)
    pairs = [(i, i + 1 if i % 2 == 0 else i - 1) for i in range(2 * n)]
    spread = [math.exp(similarity(z[i], z[p], 0.5)) for i, p in pairs]
    plain, weighted = 0.0, 0.0
    for (i, p), w in zip(pairs, spread, strict=True):
        others = math.log(sum(math.exp(similarity(z[i], z[k])) for k in range(2 * n) if k not in (i, p)))
        own = similarity(z[i], z[p])
        plain += (others - own) / (2 * n)
        weighted += (others - (2 - 2 * n * w / sum(spread)) * own) / (2 * n)
    assert float(contrast(z, z, positive, negative, T, decoupled=True)) == pytest.approx(plain, rel=1e-5, abs=1e-6)
    ours = contrast(z, z, positive, negative, T, decoupled=True, weights=weights)
    assert float(ours) == pytest.approx(weighted, rel=1e-5, abs=1e-6)
    assert float(weights[positive].mean()) == pytest.approx(1, rel=1e-5)
    assert abs(float(contrast(z, z, positive, negative, T)) - plain) > 1e-3


def test_another_read_of_a_volume_is_no_negative_of_simclr():
    positive, negative = masks(torch.tensor([0, 1, 0]))
    assert positive.sum() == 6 and not negative[0, 4] and not negative[1, 5] and negative[0, 2]


STRATEGIES = {
    # (same read, same volume, same partition) of two different rows
    "GR": (lambda read, volume, part: read, lambda read, volume, part: not read),
    "GD-": (lambda read, volume, part: read, lambda read, volume, part: not part),
    "GD": (lambda read, volume, part: read or (part and not volume), lambda read, volume, part: not part),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("volumes,partitions,versions", [(2, 4, 2), (3, 2, 3), (5, 3, 2)])
def test_global_strategies_equal_a_loop(strategy, volumes, partitions, versions):
    torch.manual_seed(partitions)
    rows = [(v * partitions + p, v, p) for v in range(volumes) for p in range(partitions) for _ in range(versions)]
    z = torch.randn(len(rows), 6)
    pull, push = STRATEGIES[strategy]

    def says(rule, i, j):
        return i != j and rule(*(rows[i][k] == rows[j][k] for k in range(3)))

    read, volume, part = (torch.tensor(each) for each in zip(*rows, strict=True))
    ours = contrast(z, z, *global_masks(strategy, read, volume, part), T)
    slow = loop(z, lambda i, j: says(pull, i, j), lambda i, j: says(push, i, j))
    assert float(ours) == pytest.approx(slow, rel=1e-5)


def test_the_global_strategies_differ_and_use_every_row():
    rows = torch.arange(6).repeat_interleave(2)
    volume, part = rows // 3, rows % 3
    z = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    values = set()
    for strategy in STRATEGIES:
        positive, negative = global_masks(strategy, rows, volume, part)
        assert bool(positive.any(1).all()) and bool(negative.any(1).all())  # the release leaves a third of a batch zero
        assert torch.equal(positive, positive.mT) and torch.equal(negative, negative.mT)
        assert not (positive & negative).any() and not positive.diagonal().any()
        values.add(round(float(contrast(z, z, positive, negative, T)), 4))
    assert len(values) == 3


def test_a_pair_of_gd_is_never_two_reads_of_one_volume():
    read, volume, part = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0])
    positive, negative = global_masks("GD", read, volume, part)
    assert not positive[0, 1] and positive[0, 2] and not negative.any()


@pytest.mark.parametrize("strategy", ["LR", "LD"])
@pytest.mark.parametrize("n,r", [(2, 4), (4, 5)])
def test_local_strategies_equal_a_loop(strategy, n, r):
    torch.manual_seed(r)
    z = torch.randn(n, 2, r, 6)
    near = torch.rand(r, r) > 0.5
    near.fill_diagonal_(False)
    near[0, 1] = near[1, 0] = True
    valid = torch.rand(n, r) > 0.3
    valid[0] = True
    volume, partition = torch.arange(n) // 2, torch.arange(n) % 2
    rows = [(i, v, u) for i in range(n) for v in range(2) for u in range(r)]

    def seen(row):
        return row[1] == 0 or bool(valid[row[0], row[2]])

    def pull(i, j):
        a, b = rows[i], rows[j]
        own = a[0] == b[0] and a[1] != b[1]
        across = strategy == "LD" and partition[a[0]] == partition[b[0]] and volume[a[0]] != volume[b[0]]
        return a[2] == b[2] and seen(a) and seen(b) and bool(own or across)

    def push(i, j):
        a, b = rows[i], rows[j]
        return a[0] == b[0] and bool(near[a[2], b[2]]) and seen(a) and seen(b)

    slow = loop(z.flatten(0, 2), pull, push)
    ours = local_loss(strategy, z, near, valid, volume, partition, T)
    assert float(ours) == pytest.approx(slow, rel=1e-5)
    positive, negative = local_masks(strategy, near, valid, volume, partition)
    assert float(contrast(z.flatten(0, 2), z.flatten(0, 2), positive, negative, T)) == pytest.approx(slow, rel=1e-5)

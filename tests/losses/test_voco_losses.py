"""VoCo's labels against voxel counting, its losses against loops over pairs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from medcl.losses.voco import (
    VARIANTS,
    base_regulariser,
    inter_volume_loss,
    next_volume,
    overlap_labels,
    prediction_loss,
    similarities,
    voco_loss,
)


@pytest.mark.parametrize(
    "crop,grid", [((4, 4, 4), (2, 3, 2)), ((6, 4, 2), (2, 2, 1)), ((3, 5, 7), (1, 2, 3)), ((8, 6, 2), (2, 2, 4))]
)
def test_overlap_labels_count_voxels(crop, grid):
    rng = np.random.default_rng(0)
    canvas = [c * g for c, g in zip(crop, grid, strict=True)]
    owner = np.zeros(canvas, dtype=int)
    for n, (i, j, k) in enumerate(itertools.product(*map(range, grid))):
        owner[i * crop[0] : (i + 1) * crop[0], j * crop[1] : (j + 1) * crop[1], k * crop[2] : (k + 1) * crop[2]] = n
    starts = np.array([[rng.integers(0, s - c + 1) for s, c in zip(canvas, crop, strict=True)] for _ in range(20)])
    labels = overlap_labels(torch.tensor(starts)[None].float(), torch.tensor(crop).float(), grid)[0].numpy()
    for start, row in zip(starts, labels, strict=True):
        inside = owner[tuple(slice(s, s + c) for s, c in zip(start, crop, strict=True))]
        counted = np.bincount(inside.ravel(), minlength=math.prod(grid)) / math.prod(crop)
        np.testing.assert_allclose(row, counted, atol=1e-6)


def ramp(cosine):
    return max(0.0, cosine)


def cos(a, b):
    a, b = a.tolist(), b.tolist()
    dot, aa, bb = (sum(x * y for x, y in zip(u, v, strict=True)) for u, v in ((a, b), (a, a), (b, b)))
    return dot / math.sqrt(aa) / math.sqrt(bb)


def mean(values):
    return sum(values) / len(values) if values else 0.0


def pairs_of(n):
    return [(i, j) for i in range(n) for j in range(i + 1, n)]


def reference_paper(student, teacher, y, volume):
    """The text of the paper, pair by pair."""
    k, off, alike = y.shape[1], [], []
    for row, labels in zip(student, y.tolist(), strict=True):
        for c, shares in enumerate(labels):
            off += [-math.log(1 - abs(share - ramp(cos(row[c], row[k + b])))) for b, share in enumerate(shares)]
        alike.append(2 / (len(row) - k) / (len(row) - k - 1)
                     * sum(abs(cos(row[k + i], row[k + j])) for i, j in pairs_of(len(row) - k)))  # fmt: skip
    return mean(off) + mean(alike)


def reference_teacher(student, teacher, y, volume):
    """The release with a whole teacher, pair by pair."""
    k, positive, weight, negative, alike = y.shape[1], 0.0, 0.0, [], []
    for mine, theirs, labels in zip(student, teacher, y.tolist(), strict=True):
        for c, shares in enumerate(labels):
            for b, share in enumerate(shares):
                guess = 0.5 * (ramp(cos(mine[c], theirs[k + b])) + ramp(cos(theirs[c], mine[k + b])))
                if share > 0:
                    positive += -share * math.log(1 - abs(share - guess) + 1e-6)
                    weight += share
                else:
                    negative.append(guess**2)
        alike += [ramp(cos(mine[k + i], mine[k + j])) ** 2 for i, j in pairs_of(len(mine) - k)]
    return positive / weight + mean(negative) + mean(alike)


def reference_v2(student, teacher, y, volume):
    """The release with two projectors, pair by pair: within volumes, then between them."""

    def cross_entropy(guesses, targets):
        attract = sum(-t * math.log(1 - abs(t - g) + 1e-6) for g, t in zip(guesses, targets, strict=True) if t > 0)
        apart = [-math.log(1 - g + 1e-6) for g, t in zip(guesses, targets, strict=True) if t == 0]
        return attract / max(sum(targets), 1e-6) + mean(apart)

    k, rows, n = y.shape[1], range(len(student)), student.shape[1] - y.shape[1]
    cells = list(itertools.product(range(k), range(k, k + n)))
    guesses = [ramp(cos(student[i, c], teacher[i, b])) for i in rows for c, b in cells]
    within = cross_entropy(guesses, y.flatten().tolist())
    guesses, targets = [], []
    for i in rows:
        others = [j % len(rows) for j in range(i + 1, i + len(rows)) if volume[j % len(rows)] != volume[i]]
        for c, b in cells if others else []:
            guesses.append(ramp(cos(student[i, c], student[others[0], b])))
            targets.append(ramp(cos(teacher[i, c], teacher[others[0], b])))
    alike = [ramp(cos(student[v, k + i], student[v, k + j])) ** 2 for v in rows for i, j in pairs_of(n)]
    return within + cross_entropy(guesses, targets) + mean(alike)


REFERENCES = {"paper": reference_paper, "teacher": reference_teacher, "v2": reference_v2}
SHAPES = {(1, 2, 4, 8): [3], (2, 3, 12, 5): [0, 1], (3, 1, 2, 16): [4, 4, 2], (4, 2, 3, 6): [0, 1, 1, 2]}


def drawn(shape):
    """Embeddings of a student and its teacher, overlaps with some pairs that do not touch, and volumes."""
    b, k, n, d = shape
    torch.manual_seed(sum(shape))
    student, teacher = torch.randn(2, b, k + n, d, dtype=torch.float64)
    y = torch.rand(b, k, n).square() * (torch.rand(b, k, n) > 0.5)
    y[:, :, 0], y[:, 0, 1] = 0.3, 0.0
    return student, teacher, y, torch.tensor(SHAPES[shape])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_equals_a_loop_over_pairs(variant, shape):
    student, teacher, y, volume = drawn(shape)
    given = None if VARIANTS[variant].teacher == "none" else teacher
    ours = float(voco_loss(VARIANTS[variant], student, given, y, volume)["loss"])
    assert ours == pytest.approx(REFERENCES[variant](student, teacher, y, volume), rel=1e-5)


def test_the_variants_are_different_losses():
    student, teacher, y, volume = drawn((2, 3, 12, 5))
    values = [float(voco_loss(v, student, teacher, y, volume)["loss"]) for v in VARIANTS.values()]
    assert min(abs(a - b) for a, b in itertools.combinations(values, 2)) > 1e-2


def test_the_regulariser_counts_by_its_weight():
    student, _, y, volume = drawn((2, 3, 12, 5))
    parts = {w: voco_loss(VARIANTS["paper"], student, None, y, volume, w) for w in (0.0, 1.0, 3.0)}
    assert float(parts[3.0]["loss"] - parts[0.0]["loss"]) == pytest.approx(3 * float(parts[1.0]["regularise"]))


def test_a_perfect_prediction_costs_nothing():
    y = torch.tensor([[[0.25, 0.75, 0.0]]])
    for weighted, negative in itertools.product((True, False), ("square", "log", "pooled")):
        assert float(prediction_loss(y.clone(), y, weighted, negative)) == pytest.approx(0, abs=1e-5)


def test_constant_embeddings_cost_what_the_formula_says():
    one, y, volume = torch.ones(2, 5, 4), torch.tensor([[[0.5, 0.5, 0.0]] * 2] * 2), torch.tensor([0, 1])
    parts = {name: voco_loss(variant, one, one, y, volume) for name, variant in VARIANTS.items()}
    # -log(eps) where the prediction is wrong by exactly 1
    worst = -math.log(1e-6)
    wanted = {"paper": (2 * math.log(2) + worst) / 3, "teacher": math.log(2) + 1, "v2": math.log(2) + worst}
    for name, value in wanted.items():
        assert float(parts[name]["predict"]) == pytest.approx(value, rel=1e-4)
        assert float(parts[name]["regularise"]) == pytest.approx(1, abs=1e-5)
    assert float(parts["v2"]["inter"]) == pytest.approx(0, abs=1e-5)


def test_orthogonal_bases_are_not_pushed():
    assert float(base_regulariser(torch.eye(4)[None])) == 0
    assert float(base_regulariser(torch.eye(4)[None], power=1)) == 0


def test_only_the_papers_regulariser_pushes_opposite_bases_together():
    opposite = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert float(base_regulariser(opposite)) == 0
    assert float(base_regulariser(opposite, power=1)) == pytest.approx(1)


@pytest.mark.parametrize(
    "volume,partner,exists",
    [
        ([5, 6, 7], [1, 2, 0], [True] * 3),
        ([5, 5, 7], [2, 2, 0], [True] * 3),
        ([5, 7, 7, 5], [1, 3, 3, 1], [True] * 4),
        ([5, 5], None, [False] * 2),
        ([5], None, [False]),
    ],
)
def test_the_next_volume_is_another_one(volume, partner, exists):
    index, found = next_volume(torch.tensor(volume))
    assert found.tolist() == exists
    assert partner is None or index.tolist() == partner


def test_a_batch_of_one_volume_has_no_term_between_volumes():
    student, teacher, y, _ = drawn((2, 3, 12, 5))
    parts = voco_loss(VARIANTS["v2"], student.requires_grad_(), teacher, y, torch.tensor([4, 4]))
    assert float(parts["inter"].detach()) == 0
    parts["loss"].backward()
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_no_gradient_reaches_the_targets(variant):
    student, teacher = (torch.randn(2, 6, 8, requires_grad=True) for _ in range(2))
    labels = torch.full((2, 3, 3), 1 / 3)
    voco_loss(variant, student, teacher, labels, torch.tensor([0, 1]), regulariser=0.0)["predict"].backward()
    assert bool((student.grad[:, :3].abs().sum(-1) > 0).any())
    assert teacher.grad is None
    # base crops learn from the prediction only where the teacher's random crops predict too
    assert bool(student.grad[:, 3:].any()) == variant.symmetric


def test_the_term_between_volumes_teaches_random_crops_and_bases_of_the_student():
    student, teacher = (torch.randn(2, 6, 8, requires_grad=True) for _ in range(2))
    inter_volume_loss(VARIANTS["v2"], student, teacher, 3, torch.tensor([0, 1])).backward()
    assert bool(student.grad[:, :3].any()) and bool(student.grad[:, 3:].any())
    assert teacher.grad is None


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_a_prediction_wrong_by_one_has_a_finite_gradient(variant):
    one = torch.ones(2, 4, 4, requires_grad=True)
    voco_loss(variant, one, one.detach(), torch.tensor([[[0.0, 1.0]] * 2] * 2), torch.tensor([0, 1]))["loss"].backward()
    assert bool(one.grad.isfinite().all())


def test_similarities_stay_float32_under_autocast():
    z = torch.randn(1, 3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert similarities(z, z).dtype == torch.float32
        assert float(similarities(z, z).max()) <= 1 + 1e-6

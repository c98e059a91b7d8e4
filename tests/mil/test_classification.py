"""Scores of classes against textbook values and scikit-learn, and intervals over groups that cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from medcl.evaluation.auroc import auroc_interval, auroc_parts
from medcl.evaluation.statistics import bootstrap_mean
from medcl.mil.audit import BagAudit
from medcl.mil.classification import (
    MIN_GROUPS,
    calibration_error,
    classification_scores,
    few_groups,
    group_bootstrap,
    rank_auroc,
)
from medcl.mil.evaluation import print_scores, score, table_of_predictions


def test_scores_have_their_textbook_values():
    p = np.array([0.1, 0.4, 0.35, 0.8])
    scores = classification_scores(np.stack([1 - p, p], 1), np.array([0, 0, 1, 1]))
    assert scores["auroc"] == pytest.approx(0.75) and scores["auprc"] == pytest.approx(0.8333, abs=1e-3)
    assert scores["accuracy"] == 0.75 and scores["balanced_accuracy"] == 0.75 and scores["f1"] == pytest.approx(2 / 3)
    assert scores["brier"] == pytest.approx(np.mean((p - [0, 0, 1, 1]) ** 2))
    assert calibration_error(np.array([0.95] * 20), np.array([True] * 19 + [False])) == pytest.approx(0, abs=1e-9)
    assert calibration_error(np.array([0.95] * 20), np.zeros(20, bool)) == pytest.approx(0.95)
    alone = classification_scores(np.array([[0.2, 0.8]]), np.array([1]))
    assert math.isnan(alone["auroc"])


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_equal_scikit_learns(classes):
    from sklearn import metrics

    rng = np.random.default_rng(classes)
    p = rng.dirichlet(np.ones(classes), 60).round(1) + 1e-3  # with ties
    p /= p.sum(1, keepdims=True)
    labels = rng.integers(0, classes, 60)
    ours = classification_scores(p, labels)
    told = p.argmax(1)
    assert ours["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, told))
    assert ours["f1"] == pytest.approx(metrics.f1_score(labels, told, average="binary" if classes == 2 else "macro"))
    auroc = (
        metrics.roc_auc_score(labels, p[:, 1]) if classes == 2 else metrics.roc_auc_score(labels, p, multi_class="ovr")
    )
    assert ours["auroc"] == pytest.approx(auroc)


def test_intervals_resample_groups_and_not_bags():
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.integers(0, 2, 12), 20)
    p = np.clip(0.5 + 0.3 * (labels - 0.5) + np.repeat(rng.normal(0, 0.3, 12), 20), 0.01, 0.99)
    probabilities = np.stack([1 - p, p], 1)
    grouped = group_bootstrap(probabilities, labels, np.repeat(np.arange(12), 20).tolist(), samples=300)["accuracy"]
    torn = group_bootstrap(probabilities, labels, list(range(240)), samples=300)["accuracy"]
    assert grouped.estimate == torn.estimate and grouped.high - grouped.low > 2 * (torn.high - torn.low)


def test_intervals_over_ten_groups_cover_the_truth_as_often_as_they_say():
    """A plain percentile of n of n groups covers about 0.9 here; the interval is that of subjects elsewhere."""

    def mean_of_the_truth(probabilities, labels):
        return {"truth": float(probabilities[np.arange(len(labels)), labels].mean())}

    rng, trials, truth, covered = np.random.default_rng(2), 400, 0.6, 0
    labels, groups = np.tile([0, 1, 1], 10), np.repeat(np.arange(10), 3).tolist()
    for trial in range(trials):
        p = np.clip(truth + np.repeat(rng.normal(0, 0.08, 10), 3) + rng.normal(0, 0.05, 30), 0, 1)
        probabilities = np.where(np.arange(2) == labels[:, None], p[:, None], 1 - p[:, None])
        told = group_bootstrap(probabilities, labels, groups, scores=mean_of_the_truth, samples=300, seed=trial)
        covered += told["truth"].low <= truth <= told["truth"].high
    assert 0.92 <= covered / trials <= 0.985, covered / trials
    told = group_bootstrap(probabilities, labels, groups, scores=mean_of_the_truth, samples=10_000)["truth"]
    same = bootstrap_mean(p, groups)
    assert (told.low, told.high) == pytest.approx((same.low, same.high), abs=0.005)
    assert told.estimate == pytest.approx(same.estimate) and told.n_subjects == same.n_subjects == 10


def bags_of(rng, positive, negative, bags, auroc, of_group=0.0):
    """Scores of groups of one class, a Gaussian each; the groups' own shift is a share of the variance."""
    groups = np.repeat(np.arange(positive + negative), bags)
    labels = (groups < positive).astype(int)
    own = rng.normal(0, math.sqrt(of_group), positive + negative)[groups]
    shift = float(stats.norm.ppf(auroc)) * math.sqrt(2)
    p = stats.norm.cdf(shift * (labels - 0.5) + own + rng.normal(0, math.sqrt(1 - of_group), len(groups)))
    return np.stack([1 - p, p], 1), labels, groups.tolist()


@pytest.mark.parametrize(
    ("positive", "negative", "bags", "auroc", "least"),
    [(10, 10, 1, 0.98, 0.94), (4, 4, 1, 0.808, 0.94), (10, 10, 3, 0.98, 0.93), (4, 16, 3, 0.9, 0.93)],
)
def test_intervals_of_the_auroc_cover_near_one_and_with_few_groups(positive, negative, bags, auroc, least):
    """Percentiles of resampled groups cover 0.57, 0.77, 0.79 and 0.84 here, and are often a point."""
    rng, trials = np.random.default_rng(0), 200

    def auroc_alone(p, labels):
        return {"auroc": rank_auroc(p[:, 1], labels > 0)}

    told = []
    for _ in range(trials):
        data = bags_of(rng, positive, negative, bags, auroc, 0.5 if bags > 1 else 0.0)
        told.append(group_bootstrap(*data, scores=auroc_alone, samples=0)["auroc"])
    assert all(each.high - each.low > 0.01 and each.low <= each.estimate <= each.high for each in told)
    assert np.mean([each.low <= auroc <= each.high for each in told]) >= least


def slow_delong(scores, positive, groups):
    """Obuchowski 1997, equations as printed, in loops: the AUROC and its variance."""
    x = [(s, g) for s, y, g in zip(scores, positive, groups, strict=True) if y]
    y = [(s, g) for s, is_x, g in zip(scores, positive, groups, strict=True) if not is_x]

    def psi(a, b):
        return 1.0 if a > b else 0.5 if a == b else 0.0

    m, n = len(x), len(y)
    area = sum(psi(a, b) for a, _ in x for b, _ in y) / (m * n)
    names = sorted(set(groups))
    v10 = {g: [sum(psi(a, b) for b, _ in y) / n for a, ga in x if ga == g] for g in names}
    v01 = {g: [sum(psi(a, b) for a, _ in x) / m for b, gb in y if gb == g] for g in names}
    i10, i01, i = sum(bool(v) for v in v10.values()), sum(bool(v) for v in v01.values()), len(names)
    s10 = i10 / ((i10 - 1) * m) * sum((sum(v) - len(v) * area) ** 2 for v in v10.values())
    s01 = i01 / ((i01 - 1) * n) * sum((sum(v) - len(v) * area) ** 2 for v in v01.values())
    s11 = i / (i - 1) * sum((sum(v10[g]) - len(v10[g]) * area) * (sum(v01[g]) - len(v01[g]) * area) for g in names)
    return area, s10 / m + s01 / n + 2 * s11 / (m * n)


@pytest.mark.parametrize("kind", ["one bag a group", "one class a group", "both classes in every group"])
def test_the_variance_by_group_is_that_of_slow_loops(kind):
    rng = np.random.default_rng(len(kind))
    n = 24
    groups = np.arange(n) if kind.startswith("one bag") else np.arange(n) // 4
    positive = np.arange(n) % 2 == 0 if kind != "one class a group" else groups % 2 == 0
    scores = (rng.normal(size=n) + positive).round(1)  # with ties
    area, parts = auroc_parts(scores, positive, groups)
    expected = slow_delong(scores.tolist(), positive.tolist(), groups.tolist())
    assert (area, float(parts @ parts)) == pytest.approx(expected)
    p = stats.norm.cdf(scores)
    told = group_bootstrap(np.stack([1 - p, p], 1), positive.astype(int), groups.tolist(), samples=0)["auroc"]
    fewest = len(set(groups[positive]))
    half = stats.t.ppf(0.975, fewest - 1) * math.sqrt(expected[1]) / (area * (1 - area))
    ends = [1 / (1 + math.exp(-(math.log(area / (1 - area)) + side))) for side in (-half, half)]
    assert [told.low, told.high] == pytest.approx(ends) and told.estimate == pytest.approx(area)


def test_an_auroc_of_one_has_newcombes_lower_end():
    p = np.array([0.1] * 5 + [0.2] * 5 + [0.8] * 6 + [0.9] * 4)
    labels = np.repeat([0, 1], 10)
    told = group_bootstrap(np.stack([1 - p, p], 1), labels, list(range(20)), samples=50)
    a, z = told["auroc"].low, stats.norm.ppf(0.975)
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)  # Hanley and McNeil 1982; with 10 and 10 Newcombe's n* is theirs
    variance = (a * (1 - a) + 9 * (q1 - a * a) + 9 * (q2 - a * a)) / 100
    assert 1 - a == pytest.approx(z * math.sqrt(variance)) and told["auroc"].high == 1.0
    assert told["accuracy"].low == pytest.approx(0.025 ** (1 / 20))  # Clopper and Pearson
    assert told["balanced_accuracy"].low == pytest.approx(a)
    for key in ("auprc", "f1"):
        assert told[key].estimate == 1.0 and not told[key].has_ends
    turned = group_bootstrap(np.stack([p, 1 - p], 1), labels, list(range(20)), samples=50)
    assert (turned["auroc"].low, turned["auroc"].high) == pytest.approx((0, 1 - a))
    flat = group_bootstrap(np.full((20, 2), 0.5), labels, list(range(20)), samples=50)
    assert flat["auroc"].low < 0.3 and flat["auroc"].high > 0.7 and not flat["brier"].has_ends


@pytest.mark.parametrize(("positive", "bags", "auroc"), [(10, 1, 0.98), (4, 3, 0.95)])
def test_intervals_of_shares_of_bags_are_no_points_and_cover(positive, bags, auroc):
    rng, trials = np.random.default_rng(1), 100
    truth = float(stats.norm.cdf(stats.norm.ppf(auroc) / math.sqrt(2)))  # of a threshold halfway
    covered = {"accuracy": 0, "balanced_accuracy": 0}

    def right(probabilities, labels):
        hit = probabilities.argmax(1) == labels
        sides = [hit[labels == c].mean() for c in set(labels.tolist())]
        return {"accuracy": float(hit.mean()), "balanced_accuracy": float(np.mean(sides))}

    for trial in range(trials):
        data = bags_of(rng, positive, positive, bags, auroc, 0.5 if bags > 1 else 0.0)
        told = group_bootstrap(*data, scores=right, samples=100, seed=trial)
        for key in covered:
            assert told[key].high - told[key].low > 0.01
            covered[key] += told[key].low <= truth <= told[key].high
    assert min(covered.values()) / trials >= 0.92, covered


def test_repeats_and_several_classes_share_one_interval():
    rng = np.random.default_rng(3)
    labels, groups = np.arange(30) % 3, (np.arange(30) // 2).tolist()
    p = rng.dirichlet(np.ones(3), (30, 2)) + 0.4 * np.eye(3)[labels][:, None]
    p /= p.sum(-1, keepdims=True)
    told = auroc_interval(p, labels, groups)
    each = [classification_scores(p[:, r], labels)["auroc"] for r in range(2)]
    assert told.estimate == pytest.approx(np.mean(each)) and told.low < told.estimate < told.high
    twice = auroc_interval(np.concatenate([p, p], 1), labels, groups)  # the same repeats again say nothing new
    assert (twice.low, twice.high) == pytest.approx((told.low, told.high))
    order = rng.permutation(30)
    moved = auroc_interval(p[order], labels[order], [groups[i] for i in order])
    assert (moved.low, moved.high) == pytest.approx((told.low, told.high))


def test_too_few_groups_are_said_and_a_whole_class_in_one_group_has_no_interval(capsys):
    def rows(groups_of_b):
        return [
            {"bag_id": f"{label}{i}", "label": label, "group": f"{label}{i % count}", "p_a": 1 - p, "p_b": p}
            for label, count, base in (("a", 8, 0.3), ("b", groups_of_b, 0.5))
            for i in range(8)
            for p in [base + 0.05 * i]
        ]

    def told(count):
        table = table_of_predictions(rows(count), ["a", "b"])
        return few_groups(table.labels, table.groups, ["a", "b"])

    assert told(MIN_GROUPS) == []
    assert told(MIN_GROUPS - 1) == [
        f"too few groups to conclude (at least {MIN_GROUPS} of every class needed): "
        f"{MIN_GROUPS - 1} of b"
    ]
    one = score(rows(1), ["a", "b"], BagAudit())
    assert one["scores"]["auroc"]["low"] is None and "no interval for AUROC" in one["warnings"][1]
    print_scores(one)
    shown = capsys.readouterr().out
    assert "[no interval]" in shown and "too few groups to conclude" in shown

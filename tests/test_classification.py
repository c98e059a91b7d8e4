"""Scores of classes against textbook values and scikit-learn, and intervals over groups that cover."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medcl.evaluation.classification import calibration_error, classification_scores, group_bootstrap
from medcl.evaluation.statistics import bootstrap_mean


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

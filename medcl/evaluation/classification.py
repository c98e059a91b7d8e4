"""Scores of class probabilities, with intervals over groups: whole patients are resampled, never bags."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from scipy import stats

from medcl.evaluation.statistics import Interval

BINS = 10  # of the calibration error
SAMPLES = 2000


def classification_scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """All scores of a set of bags.

    Args:
        probabilities: (N, C), rows sum to 1.
        labels: (N,) in 0 .. C-1.

    Returns:
        `auroc` and `auprc` (of class 1 for two classes, else the mean of one class against the rest; NaN where a class
        is missing), `accuracy`, `balanced_accuracy`, `f1` (of class 1, else the mean over classes), `brier` (mean over
        bags of the squared distance to the one-hot label, halved for two classes, as is usual) and
        `calibration_error` (expected calibration error of the predicted class, 10 equal bins; Guo et al. 2017).
    """
    from sklearn import config_context
    from sklearn.metrics import average_precision_score

    classes = probabilities.shape[1]
    predicted = probabilities.argmax(1)
    onehot = np.eye(classes)[labels]
    which = [1] if classes == 2 else list(range(classes))
    seen = [0 < onehot[:, c].sum() < len(labels) for c in which]
    auroc = auprc = math.nan
    if all(seen):
        auroc = float(np.mean([rank_auroc(probabilities[:, c], onehot[:, c] > 0) for c in which]))
        with config_context(skip_parameter_validation=True):  # thousands of bootstrap draws come through here
            auprc = float(np.mean([average_precision_score(onehot[:, c], probabilities[:, c]) for c in which]))
    table = np.zeros((classes, classes))
    np.add.at(table, (labels, predicted), 1)
    hits, present, told = table.diagonal(), table.sum(1), table.sum(0)
    f1 = 2 * hits / np.maximum(present + told, 1)
    return {
        "auroc": auroc,
        "auprc": auprc,
        "accuracy": float((predicted == labels).mean()),
        "balanced_accuracy": float((hits[present > 0] / present[present > 0]).mean()),
        "f1": float(f1[1] if classes == 2 else f1[(present + told) > 0].mean()),
        "brier": float(np.square(probabilities - onehot).sum(1).mean() / (2 if classes == 2 else 1)),
        "calibration_error": calibration_error(probabilities.max(1), predicted == labels),
    }


def rank_auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Share of pairs of a positive and a negative that the scores put in order, ties counting half."""
    ranks = stats.rankdata(scores)
    p, n = positive.sum(), (~positive).sum()
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n))


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """Mean over bags of how far confidence and accuracy lie apart in their bin of confidence."""
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    total = 0.0
    for b in range(bins):
        inside = index == b
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    return float(total)


def group_bootstrap(
    probabilities: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[Hashable],
    *,
    scores: Callable[[np.ndarray, np.ndarray], dict[str, float]] = classification_scores,
    samples: int = SAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Every score with an interval over resampled groups, as `statistics.METHOD` has it for subjects.

    A draw takes n - 1 of n groups with replacement, and the percentiles are taken at Student's t tails with n - 1
    degrees of freedom: plain percentiles of n groups are too narrow where groups are few. Both corrections are those of
    a mean, so for a score that is none (AUROC, F1) they hold approximately. Draws in which a score does not exist (a
    class is missing) are left out of its interval.

    Args:
        probabilities: (N, C).
        labels: (N,).
        groups: (N,), the patient or slide of every bag.
        scores: what to compute.
        samples: bootstrap draws.
        seed: of the draws.
        level: of the interval.
    """
    estimate = scores(probabilities, labels)
    names = list(dict.fromkeys(groups))
    members = [np.flatnonzero([g == name for g in groups]) for name in names]
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {key: [] for key in estimate}
    if len(names) > 1:
        for _ in range(samples):
            index = np.concatenate([members[i] for i in rng.integers(0, len(names), len(names) - 1)])
            for key, value in scores(probabilities[index], labels[index]).items():
                drawn[key].append(value)
    tail = float(stats.norm.cdf(stats.t.ppf((1 - level) / 2, max(1, len(names) - 1))))
    intervals = {}
    for key, value in estimate.items():
        finite = [v for v in drawn[key] if math.isfinite(v)]
        low, high = np.quantile(finite, [tail, 1 - tail]) if finite else (math.nan, math.nan)
        intervals[key] = Interval(value, float(low), float(high), len(names), level=level)
    return intervals

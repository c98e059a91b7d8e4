"""Scores of class probabilities, with intervals over groups: whole patients are what varies, never bags."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from scipy import stats

from medcl.evaluation.auroc import TINY, auroc_interval, binomial_ends, logit_ends, newcombe_ends
from medcl.evaluation.statistics import Interval

BINS = 10  # of the calibration error
SAMPLES = 2000
SHARES = ("auprc", "accuracy", "balanced_accuracy", "f1")
MIN_GROUPS = 6  # of a class, for an interval; see docs/results/auroc_intervals.md
METHOD = (
    "AUROC by logit-transformed DeLong by group; AUPRC, accuracy, balanced accuracy and F1 on the logit scale too, "
    "with the standard error of a bootstrap over groups (Student's t, one degree of freedom less than groups of the "
    "rarest class); Brier score and calibration error by percentiles of it (n-1 of n drawn, Student-t tails)"
)

Scores = Callable[[np.ndarray, np.ndarray], dict[str, float]]


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
    hits, present, claimed = table.diagonal(), table.sum(1), table.sum(0)
    f1 = 2 * hits / np.maximum(present + claimed, 1)
    return {
        "auroc": auroc,
        "auprc": auprc,
        "accuracy": float((predicted == labels).mean()),
        "balanced_accuracy": float((hits[present > 0] / present[present > 0]).mean()),
        "f1": float(f1[1] if classes == 2 else f1[(present + claimed) > 0].mean()),
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
    scores: Scores = classification_scores,
    samples: int = SAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Every score with an interval over groups.

    - `auroc` as `classification_scores` has it: see `auroc.auroc_interval`; nothing is resampled for it.
    - Shares (`SHARES`): on the logit scale as well, with the standard error of a bootstrap over groups. Where every
      group gives the same that is zero, and the ends are those of one bag a group; AUPRC and F1 have none then.
    - Any other: percentiles of the bootstrap at Student's t tails with n - 1 degrees of freedom, as `statistics.METHOD`
      has it for subjects; plain percentiles of n groups are too narrow where groups are few. Both corrections are those
      of a mean. An interval without width is left out.

    A draw takes n - 1 of n groups with replacement. Draws in which a score does not exist are left out.

    Args:
        probabilities: (N, C), or (N, repeats, C) where `scores` takes that.
        labels: (N,).
        groups: (N,), the patient or slide of every bag.
        scores: what to compute.
        samples: bootstrap draws.
        seed: of the draws.
        level: of the interval.
    """
    drawn = resampled(probabilities, labels, groups, scores, samples, seed)
    n, held = len(set(groups)), list(held_by(labels, groups).values())
    intervals = {}
    for key, value in scores(probabilities, labels).items():
        if key == "auroc":
            intervals[key] = auroc_interval(probabilities, labels, groups, level)
            continue
        if key in SHARES:
            fewest = n if key == "accuracy" else min(held)
            error = float(np.std(drawn[key])) if drawn[key] else math.nan
            ends = logit_ends(value, error, fewest - 1, level)
            if error < TINY and key == "accuracy":
                ends = binomial_ends(value, n, level)
            elif error < TINY and key == "balanced_accuracy":  # of two classes the AUROC of the predicted class
                ends = newcombe_ends(value, fewest, max(1, n - fewest), level=level)
        else:
            ends = percentile_ends(drawn[key], n, level)
        intervals[key] = Interval(value, *ends, n, level=level)
    return intervals


def resampled(
    probabilities: np.ndarray, labels: np.ndarray, groups: Sequence[Hashable], scores: Scores, samples: int, seed: int
) -> dict[str, list[float]]:
    """Scores of sets of n - 1 of n groups, drawn with replacement; those that exist."""
    names = list(dict.fromkeys(groups))
    members = [np.flatnonzero([g == name for g in groups]) for name in names]
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = defaultdict(list)
    for _ in range(samples if len(names) > 1 else 0):
        index = np.concatenate([members[i] for i in rng.integers(0, len(names), len(names) - 1)])
        for key, value in scores(probabilities[index], labels[index]).items():
            drawn[key] += [value] if math.isfinite(value) else []
    return drawn


def percentile_ends(drawn: Sequence[float], n: int, level: float = 0.95) -> tuple[float, float]:
    """Percentiles of a bootstrap at Student's t tails with n - 1 degrees of freedom; NaN where all are one number."""
    if not len(drawn) or np.ptp(drawn) < TINY:
        return math.nan, math.nan
    tail = float(stats.norm.cdf(stats.t.ppf((1 - level) / 2, max(1, n - 1))))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def held_by(labels: np.ndarray, groups: Sequence[Hashable]) -> dict[int, int]:
    """How many groups hold bags of each class."""
    return {c: len({group for group, label in zip(groups, labels, strict=True) if label == c}) for c in set(labels)}


def few_groups(labels: np.ndarray, groups: Sequence[Hashable], classes: Sequence[str]) -> list[str]:
    """A sentence where a class lies in too few groups for an interval to be trusted."""
    few = [f"{count} of {classes[c]}" for c, count in sorted(held_by(labels, groups).items()) if count < MIN_GROUPS]
    if not few:
        return []
    return [
        f"too few groups to conclude (at least {MIN_GROUPS} of every class needed): {', '.join(few)}"
    ]

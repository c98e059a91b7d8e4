"""Intervals over groups of scores between 0 and 1, near 1 as well: the AUROC, and shares of bags.

A percentile of resampled groups cannot leave the range of what was seen: where every group is in order it is the point
1, and it misses the truth whenever that happens. So the interval is built on the logit scale, which stays within 0 and
1 and reaches further on the side away from the end (Pepe 2003, section 5.2; Qin and Hotilovac 2008):

    logit(A) +- t * se / (A * (1 - A))

The standard error of the AUROC is DeLong's (DeLong et al. 1988, Biometrics 44:837: where each bag is placed among those
of the other class), summed over groups (Obuchowski 1997, Biometrics 53:567). t is Student's, with one degree of freedom
less than the groups that hold the rarer class: a spread over few groups is known badly, and normal tails, or degrees of
freedom from all groups, cover too seldom. `benchmarks/auroc_coverage.py` compares this with others.

Where groups do not differ the standard error is zero. Then the interval is that of independent bags, each group taken
for one: of an AUROC Newcombe's method 5 (2006, Statistics in Medicine 25:559), which solves `|A - a| = z * sqrt(V(a))`
with the variance of Hanley and McNeil (1982); of an accuracy that of Clopper and Pearson (1934).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from medcl.evaluation.statistics import Interval

TINY = 1e-12  # a rounding error, not a difference between groups

Floats = NDArray[np.float64]


def auroc_parts(scores: Floats, positive: NDArray[np.bool_], groups: NDArray[np.int64]) -> tuple[float, Floats]:
    """The AUROC, and how far each group moves it; the sum of the squares of these is the variance.

    With one bag a group, or one class a group, this is the variance of DeLong, of bags or of groups. With both classes
    in every group it is Obuchowski's too. Where some groups hold both and others one, the covariance of the two classes
    takes the geometric mean of their two factors n / (n - 1), hers that of all groups.

    Args:
        scores: (N,), the higher the likelier positive.
        positive: (N,), with bags of both classes.
        groups: (N,), numbers from 0 on.

    Returns:
        The share of pairs in order (ties count half), and a part per group; NaN where one group holds a whole class.
    """
    among = stats.rankdata(scores)
    parts, area = np.zeros(int(groups.max()) + 1), 0.0
    for mine, other in ((positive, ~positive), (~positive, positive)):
        below = (among[mine] - stats.rankdata(scores[mine])) / other.sum()  # share of the other class below each bag
        area = float(below.mean())
        held = len(np.unique(groups[mine]))
        factor = math.sqrt(held / (held - 1)) if held > 1 else math.nan
        sign = 1.0 if mine is positive else -1.0
        parts += sign * factor * np.bincount(groups[mine], below - area, len(parts)) / mine.sum()
    return 1.0 - area, parts


def auroc_interval(
    probabilities: Floats, labels: NDArray[np.int64], groups: Sequence[object], level: float = 0.95
) -> Interval:
    """The AUROC as `classification_scores` has it, mean over repeats, with its interval.

    Args:
        probabilities: (N, C), or (N, repeats, C).
        labels: (N,) in 0 .. C-1.
        groups: (N,), the patient or slide of every bag.
        level: of the interval.

    Returns:
        No ends where one group holds all bags of a class, no value where a class is missing (NaN).
    """
    repeats = probabilities[:, None] if probabilities.ndim == 2 else probabilities
    which = [1] if repeats.shape[2] == 2 else list(range(repeats.shape[2]))
    number = {group: n for n, group in enumerate(dict.fromkeys(groups))}
    coded = np.array([number[group] for group in groups])
    n_groups = int(coded.max()) + 1
    if not all(0 < (labels == c).sum() < len(labels) for c in which):
        return Interval(math.nan, math.nan, math.nan, n_groups, level=level)
    each = [auroc_parts(repeats[:, r, c], labels == c, coded) for c in which for r in range(repeats.shape[1])]
    area = float(np.mean([value for value, _ in each]))
    error = float(np.linalg.norm(np.mean([parts for _, parts in each], axis=0)))
    m, n = min(([len(set(coded[side])) for side in (labels == c, labels != c)] for c in which), key=min)
    ends = newcombe_ends(area, m, n, level) if error < TINY else logit_ends(area, error, min(m, n) - 1, level)
    return Interval(area, *ends, n_groups, level=level)


def logit_ends(share: float, error: float, freedom: int, level: float = 0.95) -> tuple[float, float]:
    """Ends for a share and its standard error with `freedom` degrees of freedom; NaN where one of them is none."""
    if not (freedom > 0 and 0 < share < 1 and math.isfinite(error)):
        return math.nan, math.nan
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * error / (share * (1 - share))
    centre = special.logit(share)
    return float(special.expit(centre - half)), float(special.expit(centre + half))


def newcombe_ends(area: float, m: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Ends for an AUROC of `m` positives and `n` negatives that are independent; 1 (0) is an end where the area is."""
    z = float(stats.norm.ppf((1 + level) / 2))

    def excess(a: float) -> float:
        """How far `a` lies beyond what chance explains, squared; below zero just beside the area."""
        variance = a * (1 - a) * (1 + ((m + n) / 2 - 1) * ((1 - a) / (2 - a) + a / (1 + a))) / (m * n)
        return (area - a) ** 2 - z * z * variance

    low = optimize.brentq(excess, 0, area - 1e-9) if area > TINY else 0.0
    high = optimize.brentq(excess, area + 1e-9, 1) if area < 1 - TINY else 1.0
    return float(low), float(high)


def binomial_ends(share: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's ends for a share of `n` independent ones."""
    hits, tail = share * n, (1 - level) / 2
    low = float(stats.beta.ppf(tail, hits, n - hits + 1)) if share > TINY else 0.0
    high = float(stats.beta.ppf(1 - tail, hits + 1, n - hits)) if share < 1 - TINY else 1.0
    return low, high

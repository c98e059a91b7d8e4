"""How often intervals over groups hold the truth, for the AUROC and shares of bags, near 1 and with few groups.

    python benchmarks/auroc_coverage.py --out runs/coverage [--runs 1000] [--seed 0] [--only auroc shares]

Scores are Gaussian: a class apart by what the true AUROC asks, half of the variance that of the group (all of it noise
where a group has one bag). A group is of one class, but in `mixed`, where half of the bags of every group are positive.
Each run draws groups anew. Told are the share of runs whose 95% interval holds the truth, the share that misses it from
either side, the mean width, and the share of intervals that are a point or not there. Writes `OUT/auroc.csv` and
`OUT/shares.csv`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from medcl.evaluation.auroc import auroc_interval, auroc_parts, logit_ends, newcombe_ends
from medcl.mil.classification import group_bootstrap, resampled
from medcl.runtime.files import write_rows

DRAWS = 500  # of a bootstrap
Z = float(stats.norm.ppf(0.975))
Ends = tuple[float, float]


@dataclass(frozen=True)
class Setting:
    """Groups of either class, bags in each, and the true AUROC of bags of two groups; `mixed` groups hold both."""

    positive: int
    negative: int
    bags: int
    auroc: float
    mixed: bool = False

    @property
    def groups(self) -> int:
        return self.positive + self.negative

    @property
    def shift(self) -> float:
        return float(stats.norm.ppf(self.auroc)) * math.sqrt(2)

    @property
    def of_group(self) -> float:
        return 0.5 if self.bags > 1 else 0.0

    @property
    def truth(self) -> float:
        """What the AUROC is on average: pairs within a mixed group are told apart without the group's own shift."""
        within = float(stats.norm.cdf(self.shift / math.sqrt(2 * (1 - self.of_group))))
        return self.auroc + (within - self.auroc) / self.groups if self.mixed else self.auroc

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores, whether positive, and group of every bag."""
        groups = np.repeat(np.arange(self.groups), self.bags)
        positive = np.arange(len(groups)) % 2 == 0 if self.mixed else groups < self.positive
        own = rng.normal(0, math.sqrt(self.of_group), self.groups)[groups]
        noise = rng.normal(0, math.sqrt(1 - self.of_group), len(groups))
        return self.shift * positive + own + noise, positive, groups

    def __str__(self) -> str:
        kind = f"{self.groups} mixed" if self.mixed else f"{self.positive} + {self.negative}"
        return f"{kind} groups, bags {self.bags}, AUROC {self.auroc:g}"


AUROC = [
    Setting(10, 10, 1, 0.98), Setting(4, 4, 1, 0.808), Setting(10, 10, 3, 0.98), Setting(4, 4, 3, 0.808),
    Setting(10, 10, 20, 0.98), Setting(4, 4, 20, 0.808), Setting(4, 16, 1, 0.98), Setting(4, 16, 1, 0.808),
    Setting(3, 17, 5, 0.9), Setting(20, 0, 4, 0.9, True), Setting(8, 0, 4, 0.808, True), Setting(30, 30, 1, 0.98),
    Setting(30, 30, 3, 0.75),
    Setting(30, 30, 20, 0.98),
    *(Setting(n, other or n, 5, a) for other in (0, 20) for n in (2, 3, 4, 6, 8) for a in (0.7, 0.9, 0.98)),
]  # fmt: skip
SHARES = [
    Setting(10, 10, 1, 0.999), Setting(10, 10, 1, 0.98), Setting(10, 10, 3, 0.98), Setting(4, 4, 1, 0.95),
    Setting(4, 4, 3, 0.808), Setting(4, 16, 1, 0.98), Setting(30, 30, 1, 0.98),
]  # fmt: skip


def pairs_in_order(scores: np.ndarray, positive: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of every two groups the pairs that are in order (ties half), and positives and negatives of every group."""
    which = groups[:, None] == np.arange(groups.max() + 1)
    above = scores[positive][:, None] - scores[~positive]
    order = which[positive].T @ (0.5 * (1 + np.sign(above))) @ which[~positive]
    return order, which[positive].sum(0), which[~positive].sum(0)


def areas(counts: np.ndarray, order: np.ndarray, m: np.ndarray, n: np.ndarray) -> np.ndarray:
    """AUROC of each resampled set (rows of `counts`: how often a group was drawn); without those that lack a class."""
    pairs = (counts @ m) * (counts @ n)
    kept = pairs > 0
    return ((counts[kept] @ order) * counts[kept]).sum(1) / pairs[kept]


def bca(area: float, drawn: np.ndarray, jackknife: np.ndarray) -> Ends:
    """Bias-corrected and accelerated percentiles (Efron 1987); the acceleration from leaving groups out."""
    below = float(((drawn < area).sum() + 0.5 * (drawn == area).sum()) / len(drawn))
    z0 = float(stats.norm.ppf(np.clip(below, 1e-6, 1 - 1e-6)))
    off = jackknife.mean() - jackknife
    a = float((off**3).sum() / (6 * max(1e-300, float((off**2).sum()) ** 1.5)))
    low, high = (float(stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))) for z in (-Z, Z))
    return float(np.quantile(drawn, low)), float(np.quantile(drawn, high))


def with_normal_tails(area: float, error: float) -> Ends:
    half = Z * error / (area * (1 - area))
    return float(stats.logistic.cdf(stats.logistic.ppf(area) - half)), float(
        stats.logistic.cdf(stats.logistic.ppf(area) + half)
    )


def percentiles_as_before(drawn: np.ndarray | list[float], groups: int) -> Ends:
    tail = float(stats.norm.cdf(stats.t.ppf(0.025, groups - 1)))
    return float(np.quantile(drawn, tail)), float(np.quantile(drawn, 1 - tail))


def of_auroc(setting: Setting, rng: np.random.Generator) -> Iterator[tuple[str, Ends]]:
    """The candidates on one drawn set."""
    scores, positive, groups = setting.draw(rng)
    n = setting.groups
    order, m, k = pairs_in_order(scores, positive, groups)
    area, parts = auroc_parts(scores, positive, groups)
    error = float(np.linalg.norm(parts))
    drawn, fewer = (areas(rng.multinomial(d, np.full(n, 1 / n), DRAWS), order, m, k) for d in (n, n - 1))
    held = [len(set(groups[side].tolist())) for side in (positive, ~positive)]
    at_end = newcombe_ends(area, *held)
    yield "percentile, n of n groups", (float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975)))
    yield "percentile, n - 1 of n, t tails (before)", percentiles_as_before(fewer, n)
    yield "BCa", bca(area, drawn, areas(1 - np.eye(n, dtype=int), order, m, k))
    yield "DeLong by group", (area - Z * error, min(1.0, area + Z * error))
    yield "logit, DeLong by group, z", at_end if error < 1e-12 else with_normal_tails(area, error)
    sd = float(fewer.std())
    fewest = min(held) - 1
    yield "logit, bootstrap by group, t", at_end if sd < 1e-12 else logit_ends(area, sd, fewest)
    yield "logit, DeLong by group, t of all groups", at_end if error < 1e-12 else logit_ends(area, error, n - 2)
    yield "Newcombe 5, groups for bags", at_end
    p = stats.norm.cdf(scores)
    told = auroc_interval(np.stack([1 - p, p], 1), positive.astype(int), groups.tolist())
    yield "logit, DeLong by group, t (now)", (told.low, told.high)


def share_truths(setting: Setting, rng: np.random.Generator) -> dict[str, float]:
    """Expected accuracy, balanced accuracy, F1 and AUPRC of a threshold halfway, from many bags."""
    big = Setting(setting.positive * 20_000, setting.negative * 20_000, 1, setting.auroc)
    scores, positive, _ = big.draw(rng)
    p = stats.norm.cdf(scores - setting.shift / 2)
    return shares(np.stack([1 - p, p], 1), positive.astype(int))


def shares(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Those of `classification_scores` (two classes, no ties), without what else it computes."""
    right, positive = probabilities.argmax(1) == labels, labels > 0
    hits, false = (right & positive).sum(), (~right & ~positive).sum()
    ranked = positive[np.argsort(-probabilities[:, 1])]
    precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    sides = [right[side].mean() for side in (positive, ~positive) if side.any()]
    return {
        "auprc": float(precision[ranked].mean()) if ranked.any() and not ranked.all() else math.nan,
        "accuracy": float(right.mean()),
        "balanced_accuracy": float(np.mean(sides)),
        "f1": float(2 * hits / max(1, hits + false + positive.sum())),
    }


def of_shares(setting: Setting, rng: np.random.Generator, samples: int = 200) -> Iterator[tuple[str, str, Ends]]:
    """Score, candidate and ends on one drawn set."""
    scores, positive, groups = setting.draw(rng)
    p = stats.norm.cdf(scores - setting.shift / 2)
    probabilities, labels = np.stack([1 - p, p], 1), positive.astype(int)
    seed = int(rng.integers(2**31))
    drawn = resampled(probabilities, labels, groups.tolist(), shares, samples, seed)
    told = group_bootstrap(probabilities, labels, groups.tolist(), scores=shares, samples=samples, seed=seed)
    for key in told:
        yield key, "percentile, n - 1 of n, t tails (before)", percentiles_as_before(drawn[key], setting.groups)
        yield key, "logit, t (now)", (told[key].low, told[key].high)


def line(name: str, score: str, way: str, truth: float, ends: list[Ends]) -> dict[str, object]:
    low, high = np.array(ends).T
    there = np.isfinite(low)
    width = (high - low)[there]
    return {
        "setting": name, "score": score, "truth": round(truth, 4), "interval": way,
        "covers": round(float(((low <= truth) & (truth <= high)).mean()), 3),
        "too_high": round(float((low > truth).mean()), 3), "too_low": round(float((high < truth).mean()), 3),
        "mean_width": round(float(width.mean()), 3) if len(width) else "",
        "a_point": round(float((width < 1e-9).sum() / len(low)), 3), "none": round(float((~there).mean()), 3),
    }  # fmt: skip


def main(out: Path, runs: int, seed: int, only: list[str]) -> None:
    tables: dict[str, list[dict[str, object]]] = {"auroc": [], "shares": []}
    for number, setting in enumerate(AUROC if "auroc" in only else []):
        rng, found = np.random.default_rng([seed, number]), dict[str, list[Ends]]()
        for _ in range(runs):
            for way, ends in of_auroc(setting, rng):
                found.setdefault(way, []).append(ends)
        tables["auroc"] += [line(str(setting), "auroc", way, setting.truth, ends) for way, ends in found.items()]
        print(*tables["auroc"][-len(found) :], sep="\n", flush=True)
    for number, setting in enumerate(SHARES if "shares" in only else []):
        rng, pairs = np.random.default_rng([seed, 100 + number]), dict[tuple[str, str], list[Ends]]()
        truths = share_truths(setting, rng)
        for _ in range(runs):
            for key, way, ends in of_shares(setting, rng):
                pairs.setdefault((key, way), []).append(ends)
        tables["shares"] += [line(str(setting), key, way, truths[key], ends) for (key, way), ends in pairs.items()]
        print(*tables["shares"][-len(pairs) :], sep="\n", flush=True)
    for name in only:
        write_rows(out / f"{name}.csv", tables[name])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=("auroc", "shares"), default=["auroc", "shares"])
    given = parser.parse_args()
    main(given.out, given.runs, given.seed, given.only)

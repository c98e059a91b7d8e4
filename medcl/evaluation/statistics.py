"""Intervals and paired tests that respect who was measured: subjects are resampled, never cases or voxels.

`METHOD`, where draws play no part: a percentile bootstrap with the two known small-sample biases removed. It draws
n - 1 of n subjects with replacement, which makes the bootstrap variance of a mean unbiased (McCarthy and Snowden 1985),
and it takes the percentiles at Student's t instead of the normal tails (Hesterberg 2015, arXiv:1411.5279).

`METHOD_OVER_DRAWS`, where a study repeats the draw of labelled subjects: draws and test subjects are crossed (every
draw is tested on every subject), so both are resampled, independently (Owen 2007, arXiv:0712.1111). Percentiles of that
cannot leave the range of two or three draws and would cover far too seldom, so only the standard error is taken from
it, times Student's t with the degrees of freedom that draws and subjects leave together (Satterthwaite 1946).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from medcl.evaluation.metrics import MEASURES, Measure

METHOD = "percentile bootstrap over subjects (n-1 of n drawn, Student-t tails)"
METHOD_OVER_DRAWS = (
    "standard error by a bootstrap over draws crossed with subjects, times Student's t with Satterthwaite's degrees of "
    "freedom"
)
MIN_SUBJECTS = 6  # with 5, no sign-flip test can reach p < 0.05 (2 / 2^5 = 0.0625)
MIN_DRAWS = 3  # the spread of two draws says next to nothing of other draws
_EXACT_UP_TO = 13  # subjects: 8,192 sign patterns are listed in full, beyond that they are sampled
_BLOCK = 2_000_000  # random numbers held at once

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean over subjects and its confidence interval.

    Attributes:
        estimate: mean over subjects (of the mean over draws, where there are draws).
        low: lower end; NaN where one subject is all there is.
        high: upper end.
        n_subjects: subjects that had a value.
        n_draws: draws of labelled subjects, 1 where draws play no part.
        n_excluded: subjects left out because a value was missing (NaN).
        level: confidence level.
    """

    estimate: float
    low: float
    high: float
    n_subjects: int
    n_draws: int = 1
    n_excluded: int = 0
    level: float = 0.95

    @property
    def has_ends(self) -> bool:
        """Whether both ends are finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def within(self, least: float, most: float) -> Interval:
        """The same with its ends cut to what the measure can be."""
        return replace(self, low=float(np.clip(self.low, least, most)), high=float(np.clip(self.high, least, most)))

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON: NaN becomes null."""
        return {key: _json_number(value) for key, value in vars(self).items()}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Interval:
        """Reads what `to_dict` wrote; further keys are ignored."""
        known: dict[str, Any] = {field.name: data[field.name] for field in fields(Interval) if field.name in data}
        blank: dict[str, Any] = {key: math.nan for key, value in known.items() if value is None}
        return Interval(**{**known, **blank})


@dataclass(frozen=True)
class PairedDifference:
    """The mean of `a - b` over subjects and draws, and how sure one can be of it.

    Attributes:
        interval: mean difference and its interval over draws and subjects.
        p: two-sided p of a sign-flip permutation test over subjects, each with its mean over draws. It speaks of these
            draws; the interval speaks of other draws too. A claim here needs both.
        effect_size: Cohen's d_z, mean over standard deviation of the subjects' differences; NaN where that is zero.
        exact: whether every sign pattern was listed for `p`.
    """

    interval: Interval
    p: float
    effect_size: float
    exact: bool

    def verdict(self, higher_is_better: bool = True) -> str:
        """`ahead`, `behind`, `undecided`, `few subjects` or `few draws`."""
        interval = self.interval
        if interval.n_subjects < MIN_SUBJECTS:
            return "few subjects"
        if interval.n_draws < MIN_DRAWS:
            return "few draws"
        alpha = 1 - interval.level
        if not (interval.low > 0 or interval.high < 0) or not self.p < alpha:
            return "undecided"
        return "ahead" if (interval.estimate > 0) == higher_is_better else "behind"

    def sentence(self, names: tuple[str, str] = ("pretrained", "scratch"), metric: str = "dice") -> str:
        """The result in plain words.

        Args:
            names: what `a` and `b` are called.
            metric: key of `MEASURES`, which gives scale and unit.
        """
        measure, (a, b) = MEASURES[metric], names
        interval, verdict = self.interval, self.verdict(MEASURES[metric].higher_is_better)
        draws, subjects = counted(interval.n_draws, "draw"), counted(interval.n_subjects, "subject")
        if not math.isfinite(interval.estimate):
            return f"{a} and {b} share no test subject with a {measure.title} value, so nothing can be said"
        numbers = f"{format_difference(interval, measure)}, {format_p(self.p)}, {draws} x {subjects}"
        if verdict == "few subjects":
            return f"too few test subjects to conclude (at least {MIN_SUBJECTS} needed): {a} minus {b} is {numbers}"
        if verdict == "few draws":
            few = f"too few draws of labelled subjects to conclude (at least {MIN_DRAWS} needed)"
            return f"{few}: {a} minus {b} is {numbers}"
        if verdict == "undecided":
            return f"{a} cannot be told apart from {b}: the difference is {numbers}"
        return f"{a} is {'ahead of' if verdict == 'ahead' else 'behind'} {b} by {numbers}"

    def to_dict(self) -> dict[str, Any]:
        """The interval's fields, `p`, `p_exact` and `effect_size` for JSON: NaN becomes null."""
        return {
            **self.interval.to_dict(),
            "p": _json_number(self.p),
            "p_exact": self.exact,
            "effect_size": _json_number(self.effect_size),
        }


def bootstrap_mean(
    values: ArrayLike,
    subjects: Sequence[Hashable],
    draws: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    samples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Mean over subjects with a cluster-bootstrap interval (`METHOD`, or `METHOD_OVER_DRAWS` where there are draws).

    The cases of a subject are averaged first, so each subject counts once however often it was scanned. NaN values are
    left out; a subject with no value in one of the draws is left out whole, and counted.

    Args:
        values: one value per row, `(N,)`.
        subjects: the subject of each row.
        draws: the draw of each row, if several; draws are then resampled as well.
        seed: of the resampling; equal seeds give equal intervals.
        samples: bootstrap samples.
        level: confidence level.
    """
    table, excluded = _table(values, subjects, draws)
    return _interval(table, excluded, seed, samples, level)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    subjects: Sequence[Hashable],
    draws: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    samples: int = 10_000,
    level: float = 0.95,
) -> PairedDifference:
    """Compares two arms measured on the same subjects under the same draws.

    Args:
        a: values of the one arm, `(N,)`.
        b: values of the other, row by row for the same case and draw.
        subjects: the subject of each row.
        draws: the draw of each row; None for one.
        seed: of the resampling and of the sampled sign patterns.
        samples: bootstrap samples, and sign patterns where they are sampled.
        level: confidence level.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired values must match row by row: {first.shape} and {second.shape}")
    table, excluded = _table(first - second, subjects, draws)
    differences = table.mean(axis=0) if table.size else np.empty(0)
    p, exact = sign_flip_p(differences, seed=seed, samples=samples)
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    # Equal differences leave rounding noise, not zero, as their spread.
    tiny = 1e-12 * max(1.0, float(np.abs(differences).max(initial=0.0)))
    effect = float(differences.mean()) / spread if spread > tiny else float("nan")
    return PairedDifference(_interval(table, excluded, seed, samples, level), p, effect, exact)


def sign_flip_p(differences: ArrayLike, *, seed: int = 0, samples: int = 10_000) -> tuple[float, bool]:
    """Two-sided permutation p of a zero mean: were the signs of the differences a coin's?

    Args:
        differences: one per subject, `(n,)`.
        seed: of the sampled sign patterns.
        samples: how many are sampled where listing all 2^n would be too many; the observed one is then added to them,
            so p is never zero (Phipson and Smyth 2010).

    Returns:
        The p-value (NaN for no subject) and whether all patterns were listed.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if n == 0:
        return float("nan"), True
    observed = abs(float(values.sum())) - 1e-9 * float(np.abs(values).sum())  # ties must survive rounding
    if n <= _EXACT_UP_TO:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float(np.mean(np.abs(signs @ values) >= observed)), True
    rng = np.random.default_rng(seed)
    extreme = sum(
        int(np.count_nonzero(np.abs(rng.choice((-1.0, 1.0), size=(size, n)) @ values) >= observed))
        for size in _blocks(samples, n)
    )
    return (extreme + 1) / (samples + 1), False


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction for several tests; NaN (a test not made) stays NaN and does not count."""
    adjusted = [float("nan")] * len(p_values)
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def format_interval(interval: Interval, measure: Measure, signed: bool = False) -> str:
    """`87.3 [86.1, 88.4]` in the measure's printed unit; a dash where there is no value."""
    if not math.isfinite(interval.estimate):
        return "-"
    sign = "+" if signed else ""
    return _with_ends(f"{interval.estimate * measure.scale:{sign}.{measure.digits}f}", interval, measure)


def format_difference(interval: Interval, measure: Measure) -> str:
    """`+1.9 Dice points [0.8, 3.1]`."""
    return _with_ends(f"{interval.estimate * measure.scale:+.{measure.digits}f} {measure.of}", interval, measure)


def format_p(p: float) -> str:
    """`p < 0.001`, `p = 0.012` or `p = 0.34`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def _with_ends(text: str, interval: Interval, measure: Measure) -> str:
    if not interval.has_ends:
        return f"{text} [no interval]"
    low, high = (f"{end * measure.scale:.{measure.digits}f}" for end in (interval.low, interval.high))
    return f"{text} [{low}, {high}]"


def counted(n: int, noun: str) -> str:
    """`1 case`, `2 cases`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(values: ArrayLike, subjects: Sequence[Hashable], draws: Sequence[Hashable] | None) -> tuple[Floats, int]:
    """Rows to a complete table `(draws, subjects)` of cell means, and the number of subjects that had a gap."""
    flat = np.asarray(values, dtype=np.float64)
    per_draw = list(draws) if draws is not None else [0] * len(subjects)
    if flat.ndim != 1 or not len(flat) == len(subjects) == len(per_draw):
        raise ValueError(f"one subject and one draw per value: {flat.shape}, {len(subjects)}, {len(per_draw)}")
    # Sorted, so that an interval does not depend on the order in which cases were scored.
    column = {subject: i for i, subject in enumerate(sorted(set(subjects), key=str))}
    row = {draw: i for i, draw in enumerate(sorted(set(per_draw), key=str))}
    where = np.array([row[d] for d in per_draw], dtype=int), np.array([column[s] for s in subjects], dtype=int)
    total, count = np.zeros((len(row), len(column))), np.zeros((len(row), len(column)))
    np.add.at(total, where, np.where(np.isnan(flat), 0.0, flat))
    np.add.at(count, where, ~np.isnan(flat))
    complete = (count > 0).all(axis=0)
    return total[:, complete] / count[:, complete], int(np.count_nonzero(~complete))


def _interval(table: Floats, excluded: int, seed: int, samples: int, level: float) -> Interval:
    """Mean of a complete table `(draws, subjects)` and its bootstrap interval."""
    n_draws, n = table.shape
    if n == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0, n_draws, excluded, level)
    mean, low, high = float(table.mean()), float("nan"), float("nan")
    if n > 1:
        rng = np.random.default_rng(seed)
        means = np.concatenate([_resampled(table, size, rng) for size in _blocks(samples, n + n_draws)])
        if n_draws > 1:
            half = float(means.std()) * float(stats.t.ppf((1 + level) / 2, degrees_of_freedom(table)))
            low, high = mean - half, mean + half
        else:
            tail = float(stats.norm.cdf(stats.t.ppf((1 - level) / 2, n - 1)))
            low, high = (float(end) for end in np.quantile(means, [tail, 1 - tail]))
    return Interval(mean, low, high, n, n_draws, excluded, level)


def _resampled(table: Floats, size: int, rng: np.random.Generator) -> Floats:
    """Means of `size` resampled tables: n - 1 of the n subjects, and of the draws where there are several."""
    n_draws, n = table.shape
    over_subjects = rng.multinomial(n - 1, np.full(n, 1 / n), size=size) / (n - 1)
    if n_draws == 1:
        return over_subjects @ table[0]
    over_draws = rng.multinomial(n_draws - 1, np.full(n_draws, 1 / n_draws), size=size) / (n_draws - 1)
    return np.einsum("sn,sn->s", over_draws @ table, over_subjects)


def degrees_of_freedom(table: ArrayLike) -> float:
    """Of the standard error of the mean of a table `(draws, subjects)`, two or more of each, by Satterthwaite's rule.

    The variances of the mean over draws and over subjects, each with the degrees of freedom it was estimated by: few
    where the draws differ, nearly those of the subjects where they do not.
    """
    values = np.asarray(table, dtype=np.float64)
    n_draws, n = values.shape
    parts = [(values.mean(1).var(ddof=1) / n_draws, n_draws - 1), (values.mean(0).var(ddof=1) / n, n - 1)]
    below = sum(float(part) ** 2 / df for part, df in parts)
    return float(sum(part for part, _ in parts)) ** 2 / below if below > 0 else float(n_draws - 1)


def _blocks(samples: int, width: int) -> Iterator[int]:
    """Splits the samples so that a block of random numbers stays small."""
    size = max(1, min(samples, _BLOCK // max(1, width)))
    for start in range(0, samples, size):
        yield min(size, samples - start)

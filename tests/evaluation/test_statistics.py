"""Intervals that cover, tests that hold their level, and sentences that do not overclaim."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from medcl.evaluation.statistics import (
    PairedDifference,
    bootstrap_mean,
    degrees_of_freedom,
    holm,
    paired_difference,
    sign_flip_p,
)


def rows(table: np.ndarray) -> tuple[np.ndarray, list[str], list[int]]:
    """A table `(draws, subjects)` as one row per value."""
    draws, subjects = np.indices(table.shape)
    return table.ravel(), [f"s{j:03}" for j in subjects.ravel()], draws.ravel().tolist()


def compare(table: np.ndarray, **options) -> PairedDifference:
    values, subjects, draws = rows(table)
    return paired_difference(values, np.zeros_like(values), subjects, draws, **options)


@pytest.mark.parametrize("n", [8, 40])
@pytest.mark.parametrize("skewed", [False, True])
def test_interval_covers_the_truth_as_often_as_it_says(n, skewed):
    rng, trials = np.random.default_rng(1), 400
    covered = 0
    for trial in range(trials):
        values = rng.beta(8, 2, n) if skewed else rng.normal(0.8, 0.1, n)  # Beta(8, 2): mean 0.8, a tail of failures
        interval = bootstrap_mean(values, range(n), seed=trial, samples=1000)
        covered += interval.low <= 0.8 <= interval.high
    assert 0.915 <= covered / trials <= 0.985


@pytest.mark.parametrize("draws", [2, 3, pytest.param(5, marks=pytest.mark.battery)])
@pytest.mark.parametrize(
    ("spread", "least"),  # standard deviation over draws, over subjects and of what is left
    [((1, 1, 1), 0.9), ((1, 0.3, 0.5), 0.9), ((0, 1, 0.3), 0.93)],
    ids=["all alike", "draws differ most", "draws do not differ"],
)
def test_interval_over_draws_covers_the_truth_of_other_draws(draws, spread, least):
    """Two draws come short by a little, which is why a verdict needs three."""
    rng, trials, truth = np.random.default_rng(2), 300, 0.5
    both = subjects_only = 0
    for trial in range(trials):
        shapes = ((draws, 1), (1, 30), (draws, 30))
        table = truth + sum(rng.normal(0, sd, shape) for sd, shape in zip(spread, shapes, strict=True))
        values, subjects, of = rows(table)
        interval = bootstrap_mean(values, subjects, of, seed=trial, samples=400)
        both += interval.low <= truth <= interval.high
        naive = bootstrap_mean(values, subjects, seed=trial, samples=400)  # pretends the draws were the only ones
        subjects_only += naive.low <= truth <= naive.high
    assert least - (0.06 if draws == 2 else 0) <= both / trials <= 0.985
    if spread[0]:
        assert subjects_only / trials < 0.8


def test_degrees_of_freedom_are_those_of_what_varies():
    rng = np.random.default_rng(0)
    over_draws, over_subjects = rng.normal(size=(3, 1)), rng.normal(size=(1, 30))
    flat = np.zeros((3, 30))
    assert degrees_of_freedom(flat + over_draws) == pytest.approx(2)
    assert degrees_of_freedom(flat + over_subjects) == pytest.approx(29)
    assert 2 < degrees_of_freedom(over_draws + over_subjects) < 31
    same = bootstrap_mean(*rows(flat + 0.7))
    assert (same.low, same.high) == pytest.approx((0.7, 0.7))


def test_interval_of_many_normal_values_is_the_textbook_one():
    values = np.random.default_rng(0).normal(0, 1, 400)
    interval = bootstrap_mean(values, range(400), samples=20_000)
    half = stats.t.ppf(0.975, 399) * values.std(ddof=1) / 20
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.03)


def test_cases_of_one_subject_stay_together():
    rng = np.random.default_rng(0)
    person = rng.normal(0, 1, 12)
    values, subjects = np.repeat(person, 10), np.repeat(np.arange(12), 10).tolist()
    clustered = bootstrap_mean(values, subjects)
    naive = bootstrap_mean(values, range(120))
    once = bootstrap_mean(person, range(12))
    assert (clustered.low, clustered.high) == pytest.approx((once.low, once.high))
    assert clustered.high - clustered.low > 2.5 * (naive.high - naive.low)
    assert clustered.n_subjects == 12


def test_each_subject_counts_once_however_often_scanned():
    assert bootstrap_mean([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]).estimate == pytest.approx(0.5)


def test_missing_values_are_left_out_and_counted():
    interval = bootstrap_mean([0.5, math.nan, 0.7, math.nan, 0.9], ["a", "a", "b", "c", "d"])
    assert (interval.n_subjects, interval.n_excluded) == (3, 1)  # a still has one value, c has none
    assert interval.estimate == pytest.approx(0.7)
    nothing = bootstrap_mean([math.nan], ["a"])
    assert nothing.n_subjects == 0 and nothing.to_dict()["estimate"] is None


def test_one_subject_has_no_interval():
    interval = bootstrap_mean([0.5, 0.6], ["a", "a"])
    assert interval.estimate == pytest.approx(0.55)
    assert math.isnan(interval.low) and interval.to_dict()["high"] is None


def test_a_subject_missing_from_one_draw_is_left_out_of_all():
    interval = bootstrap_mean([1, 2, 3, 4, 9], list("ababc"), [0, 0, 1, 1, 0])
    assert (interval.n_subjects, interval.n_draws, interval.n_excluded) == (2, 2, 1)
    assert interval.estimate == pytest.approx(2.5)


def test_seed_decides_everything_and_row_order_nothing():
    values, subjects, draws = rows(np.random.default_rng(0).normal(size=(3, 20)))
    first = bootstrap_mean(values, subjects, draws, seed=4)
    assert first == bootstrap_mean(values, subjects, draws, seed=4)
    assert first != bootstrap_mean(values, subjects, draws, seed=5)
    shuffle = np.random.default_rng(1).permutation(len(values))
    again = bootstrap_mean(values[shuffle], [subjects[i] for i in shuffle], [draws[i] for i in shuffle], seed=4)
    assert (first.low, first.high) == pytest.approx((again.low, again.high), abs=1e-12)


def test_large_studies_are_resampled_in_blocks():
    values = np.random.default_rng(0).normal(size=5000)
    interval = bootstrap_mean(values, range(5000), samples=1000)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / math.sqrt(5000), rel=0.1)


def test_swapping_the_arms_mirrors_the_result():
    rng = np.random.default_rng(3)
    a, subjects, draws = rows(rng.normal(0.02, 0.05, (3, 20)))
    b = rng.normal(0, 0.05, a.shape)
    forth, back = paired_difference(a, b, subjects, draws), paired_difference(b, a, subjects, draws)
    assert forth.interval.low == pytest.approx(-back.interval.high)
    assert forth.interval.high == pytest.approx(-back.interval.low)
    assert forth.effect_size == pytest.approx(-back.effect_size)
    assert forth.p == back.p


def test_exact_p_equals_listing_every_sign_pattern():
    differences = [0.3, -0.1, 0.25, 0.05, 0.4, -0.02]
    every = itertools.product((1, -1), repeat=6)
    patterns = [abs(sum(map(math.prod, zip(signs, differences, strict=True)))) for signs in every]
    expected = sum(value >= abs(sum(differences)) - 1e-12 for value in patterns) / 64
    assert sign_flip_p(differences) == (pytest.approx(expected), True)
    assert sign_flip_p([0.1] * 6)[0] == pytest.approx(2 / 64)  # rounding must not lose the tie with itself
    assert sign_flip_p([0.0] * 6)[0] == 1.0
    for tied in itertools.permutations([0.1, 0.2, -0.3]):  # a zero sum is never extreme, whatever its rounding
        assert sign_flip_p(tied)[0] == 1.0
    assert sign_flip_p([0.1, 0.2, 0.3, 0.7, -0.1, -0.2])[0] == sign_flip_p([1, 2, 3, 7, -1, -2])[0]


def test_sampled_p_agrees_with_scipy_and_is_never_zero():
    differences = np.random.default_rng(5).normal(0.3, 1, 25)
    p, exact = sign_flip_p(differences, samples=20_000)
    reference = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=20_000, random_state=0
    ).pvalue
    assert not exact and p == pytest.approx(reference, abs=0.015)
    assert sign_flip_p(np.ones(30), samples=999)[0] == pytest.approx(1 / 1000)


def test_p_holds_its_level_where_nothing_differs():
    rng = np.random.default_rng(6)
    p = [sign_flip_p(rng.standard_t(3, 10))[0] for _ in range(500)]
    assert 0.025 <= np.mean(np.array(p) < 0.05) <= 0.075


def test_p_is_over_subjects_not_over_subjects_times_draws():
    difference = np.random.default_rng(0).normal(0.1, 0.3, (1, 8))
    assert compare(np.repeat(difference, 5, axis=0)).p == compare(difference).p


def test_effect_size_is_mean_over_standard_deviation():
    table = np.random.default_rng(0).normal(1, 2, (3, 15))
    per_subject = table.mean(axis=0)
    assert compare(table).effect_size == pytest.approx(per_subject.mean() / per_subject.std(ddof=1))
    assert math.isnan(compare(np.full((2, 8), 0.1)).effect_size)


def test_holm_is_the_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    corrected = holm([0.01, math.nan])
    assert corrected[0] == pytest.approx(0.01) and math.isnan(corrected[1])


NOISE = np.random.default_rng(0).normal(0, 0.01, (3, 40))
CLEAR = 0.02 + NOISE - NOISE.mean()


@pytest.mark.parametrize(
    ("table", "metric", "begins"),
    [
        (CLEAR, "dice", "pretrained is ahead of scratch by +2.0 Dice points ["),
        (-CLEAR, "dice", "pretrained is behind scratch by -2.0 Dice points ["),
        (-CLEAR, "hd95", "pretrained is ahead of scratch by -0.02 mm HD95 ["),
        (NOISE - NOISE.mean(), "dice", "pretrained cannot be told apart from scratch: the difference is "),
        (CLEAR[:, :5], "dice", "too few test subjects to conclude (at least 6 needed): pretrained minus scratch is "),
        (CLEAR[:1], "dice", "too few draws of labelled subjects to conclude (at least 3 needed): "),
        (CLEAR[:2], "dice", "too few draws of labelled subjects to conclude (at least 3 needed): "),
        (np.full((3, 4), np.nan), "dice", "pretrained and scratch share no test subject"),
    ],
)
def test_sentence_says_no_more_than_the_numbers(table, metric, begins):
    assert compare(table).sentence(metric=metric).startswith(begins)


def test_sentence_tells_p_draws_and_subjects():
    sentence = compare(CLEAR).sentence(("ours", "theirs"))
    assert sentence.startswith("ours is ahead of theirs") and sentence.endswith("], p < 0.001, 3 draws x 40 subjects")


def test_draws_that_disagree_are_not_called_ahead():
    table = np.random.default_rng(0).normal(0, 0.002, (3, 40)) + np.array([[0.05], [-0.01], [0.0]])
    difference = compare(table)
    assert difference.p < 0.001  # for these draws the subjects agree
    assert difference.verdict() == "undecided"


@pytest.mark.parametrize("bad", [([1.0, 2.0], ["a"], None), ([1.0], ["a"], [1, 2]), ([[1.0]], ["a"], None)])
def test_mismatched_rows_are_refused(bad):
    with pytest.raises(ValueError, match="one subject and one draw per value"):
        bootstrap_mean(*bad)
    with pytest.raises(ValueError, match="row by row"):
        paired_difference([1.0, 2.0], [1.0], ["a", "b"])


def test_an_interval_can_be_cut_to_what_the_measure_can_be():
    interval = bootstrap_mean([0.02, 0.05, 0.3, 0.9], ["a", "b"] * 2, [0, 0, 1, 1])
    assert interval.low < 0 and interval.high > 1
    assert (interval.within(0, 1).low, interval.within(0, 1).high) == (0, 1)
    assert math.isnan(bootstrap_mean([0.5], ["a"]).within(0, 1).low)

import itertools
import math

import numpy as np
import pytest

from memdlm_jax.evaluation import statistics


def test_wilson_interval_against_published_values():
    # Newcombe (1998), table I, method 3.
    for successes, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)]:
        assert statistics.wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert statistics.wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert statistics.wilson_interval(29, 29)[1] == 1.0
    assert statistics.wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"successes=3 must lie in \[0, n=2\]"):
        statistics.wilson_interval(3, 2)


def test_mcnemar_is_the_binomial_test_of_the_discordant_questions():
    result = statistics.paired([1, 1, 1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 1, 0, 0])
    assert (result.n, result.only_first, result.only_second) == (8, 3, 1)
    assert result.p_value == pytest.approx(2 * (1 + 4) / 16)
    assert result.difference == pytest.approx(-0.25)
    assert statistics.Paired(100, 0, 10).p_value == pytest.approx(2 / 1024)
    assert statistics.Paired(100, 0, 0).p_value == 1.0
    assert statistics.Paired(2000, 500, 700).p_value < 1e-8


def test_interval_of_the_difference_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    chances = [0.5, 0.2, 0.1, 0.2]  # both right, only first, only second, none
    hits = 0
    for _ in range(500):
        _, first, second, _ = rng.multinomial(200, chances)
        low, high = statistics.Paired(200, first, second).interval
        hits += low <= -0.1 <= high
    assert 0.92 < hits / 500 < 0.98


def test_paired_answers_must_belong_together():
    with pytest.raises(ValueError, match="lengths 2 and 1"):
        statistics.paired([True, False], [True])
    with pytest.raises(ValueError, match="lengths 0 and 0"):
        statistics.paired([], [])


def test_holm_by_hand():
    assert statistics.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_students_t_against_tables():
    # Two-sided 5 % points: 12.706 with one degree of freedom, 2.262 with nine, 1.960 with many.
    for rows, point in ((2, 12.706), (10, 2.262), (100_000, 1.960)):
        assert statistics.t_p_value(-2 * point, 2.0, rows) == pytest.approx(0.05, abs=1e-4)
        low, high = statistics.t_interval(1.0, 2.0, rows)
        assert (low, high) == pytest.approx((1 - 2 * point, 1 + 2 * point), abs=2e-3)
    assert statistics.t_p_value(0.0, 0.0, 5) == 1.0
    assert statistics.t_p_value(0.1, 0.0, 5) == 0.0
    for function in (statistics.t_p_value, statistics.t_interval):
        with pytest.raises(ValueError, match="rows=1 must be at least 2"):
            function(1.0, 1.0, 1)


def test_differences_of_few_rows_are_found_no_oftener_than_they_should():
    rng = np.random.default_rng(0)
    rows = 6
    found = [
        statistics.t_p_value(*statistics.ratio_estimate(rng.normal(size=rows), [1] * rows), rows)
        for _ in range(2000)
    ]
    assert 0.035 < np.mean(np.array(found) < 0.05) < 0.065


def test_ratio_estimate_is_the_mean_for_equal_counts():
    values = np.array([1.0, 2.0, 4.0])
    ratio, error = statistics.ratio_estimate(values * 5, [5, 5, 5])
    assert ratio == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / math.sqrt(3))
    with pytest.raises(ValueError, match="two or more rows"):
        statistics.ratio_estimate([1.0], [1])


def test_the_bootstrap_of_a_mean_is_as_wide_as_students_interval():
    x = np.random.default_rng(0).normal(3.0, 2.0, (400, 2))
    low, high = statistics.bootstrap(lambda rows: rows.mean(0), [x], resamples=3000, seed=1)
    error = x.std(0, ddof=1) / 20
    np.testing.assert_allclose(low, x.mean(0) - 1.96 * error, atol=0.12 * error.max())
    np.testing.assert_allclose(high, x.mean(0) + 1.96 * error, atol=0.12 * error.max())


def test_the_bootstrap_keeps_rows_together():
    x = np.random.default_rng(0).normal(size=50)
    low, high = statistics.bootstrap(lambda a, b: (a - b).mean(), [x, x - 1], resamples=100)
    assert low == pytest.approx(1) and high == pytest.approx(1)
    for rows in ([x, x[:-1]], [x[:1]]):
        with pytest.raises(ValueError, match="one number, at least 2, is asked"):
            statistics.bootstrap(lambda *a: a[0].mean(), rows)


def test_mean_interval():
    rng = np.random.default_rng(0)
    values = rng.random(200)
    mean, low, high = statistics.mean_interval(values)
    error = values.std(ddof=1) / 200**0.5
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.01)
    assert statistics.mean_interval(np.ones(20)) == (1.0, *statistics.wilson_interval(20, 20))
    half = statistics.mean_interval(np.full(20, 0.5))
    assert half == (0.5, *statistics.wilson_interval(10, 20))
    for wrong in ([0.5], [0.5, 1.5], [-0.1, 0.5]):
        with pytest.raises(ValueError, match="two or more scores in"):
            statistics.mean_interval(wrong)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (0, 1), (1, 6), (2, 9), (5, 5)])
def test_sign_flips_of_zeros_and_ones_are_mcnemars_test(only_first, only_second):
    same = 20 - only_first - only_second
    first = [1] * only_first + [0] * only_second + [1] * same
    second = [0] * only_first + [1] * only_second + [1] * same
    found, exact = statistics.paired_means(first, second), statistics.paired(first, second)
    assert found.p_value == pytest.approx(exact.p_value) and found.interval == exact.interval
    # The same flips, drawn or counted, where scores are halves.
    halves = statistics.paired_means(np.array(first) / 2, np.array(second) / 2)
    assert halves.p_value == pytest.approx(exact.p_value)
    assert found.difference == pytest.approx(exact.difference)


def test_sign_flips_against_all_of_them():
    change = np.array([0.5, -0.25, 1.0, 0.75, -0.5, 0.25])
    signs = np.array(list(itertools.product((1, -1), repeat=6)))
    sums = signs @ change
    share = min((sums >= change.sum()).mean(), (sums <= change.sum()).mean())
    found = statistics.paired_means(np.zeros(6), change)
    assert found.p_value == pytest.approx(min(1, 2 * share))
    with pytest.raises(ValueError, match="paired scores of lengths 2 and 3"):
        statistics.paired_means([0, 1], [0, 1, 1])

"""Intervals and paired tests: small, exact where that is cheap."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927); (0, 1) without any trial.

    Successes may be a sum of shares.

    Raises:
        ValueError: ``successes`` does not lie in [0, n].
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes} must lie in [0, n={n}]")
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At 0 and n successes the bounds are exactly 0 and 1; rounding would miss them.
    return max(0.0, centre - half) * (successes > 0), 1.0 if successes == n else centre + half


@dataclasses.dataclass(frozen=True)
class Paired:
    """Two systems on the same n questions.

    Attributes:
        n: questions.
        only_first: questions that only the first system answers rightly.
        only_second: questions that only the second system answers rightly.
    """

    n: int
    only_first: int
    only_second: int

    @property
    def difference(self) -> float:
        """Accuracy of the second minus that of the first, in [-1, 1]."""
        return (self.only_second - self.only_first) / self.n

    @property
    def p_value(self) -> float:
        """Exact two-sided McNemar test: discordant questions fall either way with chance 1/2."""
        trials, fewer = self.only_first + self.only_second, min(self.only_first, self.only_second)
        tail = sum(math.comb(trials, k) for k in range(fewer + 1))
        return min(1.0, 2 * tail / 2**trials)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference: Wald's, with 1/2 added to each of the four counts.

        Agresti and Min, Statistics in Medicine 24 (2005).
        """
        n, first, second = self.n + 2, self.only_first + 0.5, self.only_second + 0.5
        centre = (second - first) / n
        half = Z95 * math.sqrt((first + second) / n - centre**2) / math.sqrt(n)
        return max(-1.0, centre - half), min(1.0, centre + half)


def paired(first: ArrayLike, second: ArrayLike) -> Paired:
    """Count agreements of two systems, question by question.

    Raises:
        ValueError: the sequences differ in length or are empty.
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"paired answers have lengths {a.size} and {b.size}: equal, above 0 asked")
    return Paired(a.size, int((a & ~b).sum()), int((b & ~a).sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for having done that many tests (Holm, 1979), in the given order."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(np.asarray(p_values), kind="stable")):
        running = max(running, (len(p_values) - place) * p_values[index])
        adjusted[index] = min(1.0, running)
    return adjusted


def t_p_value(estimate: float, standard_error: float, rows: int) -> float:
    """Two-sided p-value of "the true value is zero", Student's t with ``rows - 1`` degrees.

    1 if estimate and error are both zero. A normal test would find too much in few rows.

    Raises:
        ValueError: fewer than two rows.
    """
    _check_rows(rows)
    if standard_error == 0:
        return float(estimate == 0)
    return float(2 * stats.t.sf(abs(estimate) / standard_error, rows - 1))


def t_interval(estimate: float, standard_error: float, rows: int) -> tuple[float, float]:
    """95 % interval of an estimate over rows, Student's t with ``rows - 1`` degrees.

    Raises:
        ValueError: fewer than two rows.
    """
    _check_rows(rows)
    half = float(stats.t.ppf(0.975, rows - 1)) * standard_error
    return estimate - half, estimate + half


def _check_rows(rows: int) -> None:
    if rows < 2:
        raise ValueError(f"rows={rows} must be at least 2: one row says nothing of its spread")


def ratio_estimate(sums: ArrayLike, counts: ArrayLike) -> tuple[float, float]:
    """Sum over rows divided by count over rows, with its standard error over the rows.

    Rows weigh by their counts, so the error is that of a ratio estimator (Cochran, Sampling
    Techniques, section 2.11), not of a mean of per-row means.

    Raises:
        ValueError: fewer than two rows, lengths differ, or nothing was counted.
    """
    x, m = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    if x.shape != m.shape or len(x) < 2 or m.sum() <= 0:
        raise ValueError(
            f"{x.size} sums and {m.size} counts: a standard error needs two or more rows, as many "
            "counts as sums, and a positive total count"
        )
    ratio = x.sum() / m.sum()
    spread = np.sqrt(np.sum((x - ratio * m) ** 2) * len(x) / (len(x) - 1))
    return float(ratio), float(spread / m.sum())


def mean_interval(
    values: ArrayLike, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of a score over questions, with its 95 % bootstrap interval: (mean, low, high).

    Where all scores are equal a bootstrap finds no spread at all; the interval is then Wilson's,
    which holds for any scores in [0, 1], since none spread more than zeros and ones.

    Args:
        values: [n] scores in [0, 1].
        resamples: of the bootstrap.
        seed: of its draws.

    Raises:
        ValueError: fewer than two values, or one outside of [0, 1].
    """
    scores = np.asarray(values, np.float64)
    if len(scores) < 2 or scores.min() < 0 or scores.max() > 1:
        raise ValueError(f"values={values!r}: two or more scores in [0, 1] are needed")
    mean = float(scores.mean())
    if scores.min() == scores.max():
        return mean, *wilson_interval(mean * len(scores), len(scores))
    low, high = bootstrap(np.mean, [scores], resamples, seed)
    return mean, float(low), float(high)


@dataclasses.dataclass(frozen=True)
class PairedMeans:
    """Two systems' scores on the same n questions.

    Attributes:
        n: questions.
        difference: mean score of the second minus that of the first.
        interval: of the difference, 95 %, by bootstrap over questions.
        p_value: two-sided, of the test that flips the signs of the differences at random; exact
            where at most 13 questions differ, else by 9999 draws and never below 0.0002.
    """

    n: int
    difference: float
    interval: tuple[float, float]
    p_value: float


def paired_means(
    first: ArrayLike, second: ArrayLike, resamples: int = 2000, seed: int = 0
) -> PairedMeans:
    """Compare scores question by question.

    Scores that are all 0 or 1 have ``paired``'s interval and exact McNemar test, which is what
    flipping signs comes to. So has the interval where no score differs at all: a bootstrap would
    find no spread.

    Raises:
        ValueError: the numbers of scores differ, or there are fewer than two.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape or len(a) < 2:
        raise ValueError(f"paired scores of lengths {len(a)} and {len(b)}: equal, above 1 asked")
    change = b - a
    moved = change[change != 0]
    if not len(moved) or set(np.concatenate([a, b])) <= {0.0, 1.0}:
        counts = paired(a == 1, b == 1) if len(moved) else Paired(len(a), 0, 0)
        return PairedMeans(len(a), counts.difference, counts.interval, counts.p_value)
    low, high = bootstrap(np.mean, [change], resamples, seed)
    p = 1.0
    if len(moved) > 1:
        test = stats.permutation_test(
            (moved,), np.sum, permutation_type="samples", n_resamples=9999, vectorized=False,
            rng=np.random.default_rng(seed),
        )  # fmt: skip
        p = float(test.pvalue)
    return PairedMeans(len(a), float(change.mean()), (float(low), float(high)), p)


def bootstrap(
    estimate: Callable[..., np.ndarray],
    rows: Sequence[ArrayLike],
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of an estimate, by drawing rows with replacement (Efron, 1979).

    Args:
        estimate: the arrays, each with the drawn rows first -> a number or an array.
        rows: arrays with one entry of their first axis per row; all are drawn alike, so that what
            belongs to a row stays together.
        resamples: draws.
        seed: of the draws.

    Returns:
        (low, high), shaped like the estimate.

    Raises:
        ValueError: the arrays differ in their number of rows, or there are fewer than two.
    """
    arrays = [np.asarray(array) for array in rows]
    counts = {len(array) for array in arrays}
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError(f"bootstrap over {sorted(counts)} rows: one number, at least 2, is asked")
    rng, n = np.random.default_rng(seed), counts.pop()
    drawn = []
    for _ in range(resamples):
        chosen = rng.integers(n, size=n)
        drawn.append(estimate(*(array[chosen] for array in arrays)))
    low, high = np.quantile(np.stack(drawn), (0.025, 0.975), axis=0)
    return low, high

"""Lengths of batches: as few as keep the padding low, because each costs a compilation."""

import numpy as np
from jaxtyping import Int

from memdlm_jax.data.text import check_at_least


def check_buckets(buckets: tuple[int, ...]) -> None:
    """Raise ValueError unless there are buckets and they ascend."""
    for length in buckets:
        check_at_least("buckets", length, 1)
    if not buckets or list(buckets) != sorted(set(buckets)):
        raise ValueError(f"buckets={buckets} must be ascending lengths, at least one")


def padding_share(
    lengths: Int[np.ndarray, "rows"], buckets: tuple[int, ...], rows_per_batch: int
) -> float:
    """Share of an epoch's positions that hold no token of a row, in [0, 1).

    Counts the ends of rows and the rows of padding that complete the last batch of a bucket.

    Args:
        lengths: [rows] tokens of each row, at least one row.
        buckets: ascending; the last holds the longest row.
        rows_per_batch: rows of a batch.
    """
    rows = np.bincount(np.searchsorted(buckets, lengths), minlength=len(buckets))
    batches = -(-rows // rows_per_batch)
    positions = rows_per_batch * int(batches @ np.asarray(buckets))
    return 1 - int(np.sum(lengths, dtype=np.int64)) / positions


def best_buckets(
    lengths: Int[np.ndarray, "rows"],
    last: int,
    rows_per_batch: int,
    most: int,
    multiple: int = 1,
) -> list[tuple[int, ...]]:
    """The buckets with the fewest positions an epoch, for each number of buckets.

    Exact, by dynamic programming over the lengths that occur: of all ways to end at a length, the
    cheapest continues the cheapest way to end at a shorter one with a bucket less.

    Args:
        lengths: [rows] tokens of each row, at least one row.
        last: length of the last bucket; no row is longer.
        rows_per_batch: rows of a batch.
        most: largest number of buckets.
        multiple: the buckets but the last are multiples of this.

    Returns:
        Ascending lengths, for 1 .. ``most`` buckets, or as many as there are lengths to choose;
        each bucket but the last holds rows.
    """
    rounded = np.minimum(-(-np.asarray(lengths, np.int64) // multiple) * multiple, last)
    ends, rows = np.unique(np.append(rounded, last), return_counts=True)
    rows[-1] -= 1
    before = np.concatenate([[0], np.cumsum(rows)])  # [j]: rows of the first j lengths
    cheapest = np.full((most + 1, len(before)), np.inf)  # [n, j]: n buckets for those rows
    cheapest[0, 0] = 0
    previous = np.zeros(cheapest.shape, int)
    for j in range(1, len(before)):
        batches = -(-(before[j] - before[:j]) // rows_per_batch)
        positions = cheapest[:-1, :j] + batches * rows_per_batch * ends[j - 1]
        cheapest[1:, j], previous[1:, j] = positions.min(1), positions.argmin(1)
    counts = range(1, min(most, len(ends)) + 1)
    return [_walk_back(previous, ends, count) for count in counts]


def _walk_back(
    previous: Int[np.ndarray, "n lengths"], ends: Int[np.ndarray, "lengths"], count: int
) -> tuple[int, ...]:
    """The lengths of the cheapest way with ``count`` buckets."""
    found, place = [], len(ends)
    for n in range(count, 0, -1):
        found.append(int(ends[place - 1]))
        place = previous[n, place]
    return tuple(reversed(found))


def fewest_buckets(
    lengths: Int[np.ndarray, "rows"],
    last: int,
    rows_per_batch: int,
    most: int,
    multiple: int,
    max_padding: float,
) -> tuple[int, ...]:
    """As few buckets as keep ``padding_share`` at ``max_padding`` or below.

    Where ``most`` buckets do not reach it, those with the least padding.

    Args:
        lengths: [rows] tokens of each row.
        last: length of the last bucket.
        rows_per_batch: rows of a batch.
        most: largest number of buckets.
        multiple: the buckets but the last are multiples of this.
        max_padding: share of an epoch's positions, in [0, 1).

    Raises:
        ValueError: there are no rows, or one is longer than ``last``.
    """
    if not len(lengths):
        raise ValueError("lengths is empty: there is no row to choose buckets for")
    if lengths.max() > last:
        raise ValueError(f"last={last} must be at least {lengths.max()}, the longest row")
    candidates = best_buckets(lengths, last, rows_per_batch, most, multiple)
    shares = [padding_share(lengths, buckets, rows_per_batch) for buckets in candidates]
    enough = (i for i, share in enumerate(shares) if share <= max_padding)
    return candidates[next(enough, int(np.argmin(shares)))]

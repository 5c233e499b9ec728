"""Buckets: the best of all there are, no more than needed, and the padding they leave."""

import itertools

import numpy as np
import pytest

from memdlm_jax.data import sources
from memdlm_jax.data.buckets import best_buckets, fewest_buckets, padding_share
from memdlm_jax.data.pipeline import PipelineConfig
from memdlm_jax.data.tokenizer import Tokenizer


def share_by_hand(lengths, buckets, rows_per_batch):
    """Sort the rows, cut them into batches, count the places."""
    left, positions = sorted(lengths), 0
    for bucket in buckets:
        inside = [n for n in left if n <= bucket]
        left = left[len(inside) :]
        positions += sum(rows_per_batch * bucket for _ in inside[::rows_per_batch])
    assert not left
    return 1 - sum(lengths) / positions


def best_of_all(lengths, last, rows_per_batch, count, multiple):
    """Least share of any ``count`` buckets that end at ``last``, none without rows."""

    def without_rows(buckets):
        bounds = itertools.pairwise((0, *buckets))
        return any(not any(low < n <= high for n in lengths) for low, high in bounds)

    inner = itertools.combinations(range(multiple, last, multiple), count - 1)
    every = [(*some, last) for some in inner]
    return min(share_by_hand(lengths, b, rows_per_batch) for b in every if not without_rows(b))


@pytest.mark.parametrize(("rows_per_batch", "multiple"), [(1, 1), (1, 3), (4, 1), (7, 2)])
def test_no_other_buckets_have_less_padding(rows_per_batch, multiple):
    rng = np.random.default_rng(multiple)
    for _ in range(6):
        lengths = rng.choice(rng.integers(1, 15, 6), 40)
        last = int(-(-lengths.max() // multiple) * multiple)
        found = best_buckets(lengths, last, rows_per_batch, 4, multiple)
        for count, buckets in enumerate(found, start=1):
            assert len(buckets) == count and buckets[-1] == last
            assert list(buckets) == sorted(set(buckets)) and not np.mod(buckets, multiple).any()
            least = best_of_all(lengths, last, rows_per_batch, count, multiple)
            share = padding_share(lengths, buckets, rows_per_batch)
            assert share == pytest.approx(share_by_hand(lengths, buckets, rows_per_batch))
            assert share == pytest.approx(least, abs=1e-12)


def test_there_are_as_many_as_there_are_lengths_at_most():
    assert best_buckets(np.asarray([3, 3, 9]), 9, 1, 8) == [(9,), (3, 9)]
    # The last one need not hold a row of these, nor be a multiple.
    assert best_buckets(np.asarray([3, 3, 9]), 13, 1, 8, 4)[-1] == (4, 12, 13)


def test_no_more_buckets_than_the_padding_asks_for():
    lengths = np.random.default_rng(0).integers(1, 257, 5000)
    shares = [padding_share(lengths, b, 8) for b in best_buckets(lengths, 256, 8, 16, 8)]
    for count in (2, 5, 9):
        bound = shares[count - 1]
        assert len(fewest_buckets(lengths, 256, 8, 16, 8, bound)) == count
        assert len(fewest_buckets(lengths, 256, 8, 16, 8, bound - 1e-9)) == count + 1
    assert padding_share(lengths, fewest_buckets(lengths, 256, 8, 4, 8, 0.0), 8) == shares[3]
    # Half-empty batches can cost more than long rows: three of two rows, not one of six.
    assert fewest_buckets(np.asarray([8, 16, 24]), 24, 6, 16, 8, 0.0) == (24,)


def test_bad_lengths_are_named():
    with pytest.raises(ValueError, match="lengths is empty"):
        fewest_buckets(np.zeros(0, int), 8, 1, 4, 1, 0.1)
    with pytest.raises(ValueError, match="last=8 must be at least 9, the longest row"):
        fewest_buckets(np.asarray([9]), 8, 1, 4, 1, 0.1)


def test_the_default_pads_real_conversations_by_no_more_than_8_percent():
    pytest.importorskip("chitchat_dataset")
    tokenizer = Tokenizer.load("memdlm_jax/assets/tiny/tokenizer.json")
    config, lengths = PipelineConfig(), []
    said = [
        turns for group, turns in sources.chitchat_turns() if sources.split_of(group) == "train"
    ]
    encoded = iter(tokenizer.encode_batch([text for turns in said for _, text in turns]))
    for turns in said:
        # A turn has an opening and an end; a row is a conversation up to its turn.
        rows = np.cumsum([len(next(encoded)) + 2 for _ in turns])[1:]
        lengths += [n for n in rows.tolist() if n <= 512]
    assert len(lengths) == 47_087 and sum(lengths) == 10_392_389
    found = fewest_buckets(
        np.asarray(lengths), 512, config.rows_per_batch,
        config.max_buckets, config.bucket_multiple, config.max_padding,
    )  # fmt: skip
    assert share_by_hand(lengths, found, config.rows_per_batch) <= 0.08
    assert len(found) < config.max_buckets

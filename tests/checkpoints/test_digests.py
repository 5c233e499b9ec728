"""Digests: a plain loop gives the same, wherever entries lie; every change shows."""

import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.checkpoints import digests

WORD = 0xFFFFFFFF


def mixed(x):
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & WORD
    return x ^ (x >> 16)


def plain(array):
    """The digest by a loop over entries."""
    array = np.asarray(array)
    word = {1: np.uint8, 2: np.uint16}.get(array.dtype.itemsize, np.uint32)
    words = array.view(word).reshape((*array.shape, 2) if array.itemsize == 8 else array.shape)
    sums = [0] * 4
    for place, value in np.ndenumerate(words.reshape(words.shape or (1,))):
        for i, seed in enumerate(digests._SEEDS):
            found = seed
            for index in place:
                found = mixed((found + index) & WORD)
            sums[i] = (sums[i] + mixed(found ^ int(value))) & WORD
    return "".join(f"{total:08x}" for total in sums)


@pytest.mark.parametrize(
    "array",
    [
        np.float32(1.5),
        np.arange(7, dtype=np.int32),
        np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32),
        np.random.default_rng(1).normal(size=(5, 3)).astype(jnp.bfloat16),
        np.arange(12, dtype=np.int8).reshape(2, 6) - 4,
        np.array([[True, False, True]]),
        np.zeros((2, 0, 3), np.float32),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_a_loop_over_entries_gives_the_same(array):
    assert digests.digest(array) == plain(array)


def test_blocks_that_do_not_fit_evenly_are_counted_once(monkeypatch):
    array = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)
    expected = plain(array)
    for block in (1, 6, 9, 12, 33, 1000):
        monkeypatch.setattr(digests, "BLOCK", block)
        digests._summing.cache_clear()
        assert digests.digest(array) == expected, block


def test_wide_entries(float64):
    array = np.random.default_rng(0).normal(size=(3, 2))
    assert digests.digest(array) == plain(array)


def test_every_change_shows():
    array = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    seen = {digests.digest(array), digests.digest(array[::-1]), digests.digest(array[:, ::-1])}
    seen |= {digests.digest(array.reshape(6, 4)), digests.digest(-0.0 * array)}
    seen |= {digests.digest(0.0 * np.abs(array))}
    for place in np.ndindex(array.shape):
        for bit in (0, 13, 31):
            other = array.copy()
            other.view(np.uint32)[place] ^= np.uint32(1 << bit)
            seen.add(digests.digest(other))
    assert len(seen) == 6 + 24 * 3

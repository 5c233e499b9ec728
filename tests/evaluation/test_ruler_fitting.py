"""Counting pieces and fitting them to a length."""

import itertools

import pytest

from memdlm_jax.evaluation.ruler.fitting import Draft, TokenCounter, fit, shares


@pytest.fixture
def counter():
    return TokenCounter(lambda text: ["<s>", *text])


def test_a_piece_has_no_token_for_the_start(counter):
    assert counter.count("abc") == 4
    assert counter.piece("abc") == 3
    assert counter.piece("") == 1  # So that no loop over pieces is endless.


@pytest.mark.parametrize(
    ("room", "start"),
    [
        (0, ""),
        (3, ""),
        (4, "One"),
        (8, "One"),
        (9, "One two-"),
        (11, "One two-"),
        (12, "One two-six"),
        (99, "One two-six"),
    ],
)
def test_first_words_are_the_longest_that_fit(room, start, counter):
    assert counter.first_words("One two-six seven.", room, lead=" ") == start


def test_take_fills_the_room_to_the_token(counter):
    texts = ["aaaa", "bb", "cc dd ee ff"]
    assert counter.take(texts, 0, " ") == ([], "")
    assert counter.take(texts, 4, " ") == ([], "")
    assert counter.take(texts, 5, " ") == (["aaaa"], "")
    assert counter.take(texts, 8, " ") == (["aaaa", "bb"], "")
    assert counter.take(texts, 13, " ") == (["aaaa", "bb"], "cc")
    assert counter.take(texts, 14, " ") == (["aaaa", "bb"], "cc dd")
    assert counter.take(texts, 20, " ") == (texts, "")
    assert counter.take(itertools.repeat("a"), 100, " ") == (["a"] * 50, "")


def draft(length):
    return Draft("q" * length, " ", "A:", " x", ("x",))


@pytest.mark.parametrize("drift", [-0.4, -0.1, 0.0, 0.1, 0.6])
def test_fit_corrects_what_the_pieces_miss(drift):
    counter = TokenCounter(lambda text: text)
    found, tokens = fit(lambda room: draft(100 + int(room * (1 + drift))), counter, 1000)
    assert tokens == len(found.prompt) and 990 <= tokens <= 1000


def test_fit_of_steps_takes_the_largest_that_fits():
    counter = TokenCounter(lambda text: text)
    found, tokens = fit(lambda room: draft(100 + room // 300 * 300), counter, 1000)
    assert tokens == len(found.prompt) == 703
    assert fit(lambda room: draft(998 + room), counter, 1000) is None
    assert fit(lambda room: draft(997 + room), counter, 1000)[1] == 1000


def test_shares():
    assert shares([1, 3]) == [0.0, 0.25, 1.0]
    assert shares([]) == [0.0]

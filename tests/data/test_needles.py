"""Needle episodes: RULER's wording to the character, exact lengths, no test key in training."""

import re
from pathlib import Path

import numpy as np
import pytest

from memdlm_jax.data.example import TURN_TOKENS
from memdlm_jax.data.filler import Filler
from memdlm_jax.data.needles import (
    REPEATED,
    NeedleConfig,
    NeedleTask,
    chance_floor,
    key_parts,
    string_match_all,
)
from memdlm_jax.data.sft import EncodeConfig, Encoder
from memdlm_jax.data.tokenizer import Tokenizer

ONE = (
    r"A special magic number is hidden within the following text\. Make sure to memorize it\. "
    r"I will quiz you about the number afterwards\.\n(?P<context>.*)\n"
    r"What is the special magic number for (?P<key>.+) mentioned in the provided text\? "
    r"The special magic number for (?P=key) mentioned in the provided text is"
)
MANY = (
    r"Some special magic numbers are hidden within the following text\. Make sure to memorize it\. "
    r"I will quiz you about the numbers afterwards\.\n(?P<context>.*)\n"
    r"What are all the special magic numbers for (?P<key>.+) mentioned in the provided text\? "
    r"The special magic numbers for (?P=key) mentioned in the provided text are"
)
SHORT = (
    r"(?P<context>.*)\nThe special magic number for (?P<key>.+) mentioned in the provided text is"
)
NEEDLE = r"One of the special magic numbers for ([^:]+) is: (\d+)\."

CONFIGS = [
    NeedleConfig(length=192),
    NeedleConfig(length=256, num_keys=4, value_digits=4),
    NeedleConfig(length=300, num_keys=2, key_words=2, split="test"),
    NeedleConfig(length=256, num_keys=2, haystack="repeat", split="validation"),
    NeedleConfig(length=300, num_values=4, value_digits=7),
    NeedleConfig(length=192, num_keys=3, template="short"),
]


@pytest.fixture(params=CONFIGS, ids=lambda c: f"{c.length}-{c.num_keys}-{c.haystack}-{c.template}")
def task(request, tokenizer, sentences) -> NeedleTask:
    return NeedleTask(request.param, tokenizer, sentences)


def test_wording_is_rulers(task):
    c = task.config
    pattern = SHORT if c.template == "short" else ONE if c.num_values == 1 else MANY
    for index in range(50):
        episode = task.episode(3, index)
        match = re.fullmatch(pattern, episode.prompt, re.DOTALL)
        assert match and match["key"] == episode.key
        needles = re.findall(NEEDLE, match["context"])
        assert tuple(value for _, value in needles) == episode.all_values
        assert len(set(episode.all_values)) == c.num_keys * c.num_values
        assert len({key for key, _ in needles}) == c.num_keys
        assert tuple(v for k, v in needles if k == episode.key) == episode.values
        assert all(len(value) == c.value_digits for value in episode.all_values)
        assert episode.response == " " + ", ".join(episode.values)
        assert string_match_all(episode.response, episode.values) == 1.0


def test_length_is_filled_and_never_exceeded(task, tokenizer):
    for index in range(100):
        episode = task.episode(0, index)
        length = len(episode.prompt_ids) + len(tokenizer.encode(episode.response)) + TURN_TOKENS
        assert 0.95 * task.config.length <= length <= task.config.length


def test_rows_under_a_chat_template_fit(sentences):
    folder = Path(__file__).parents[1] / "golden" / "tokenizer_llada"
    public = Tokenizer.load(folder)
    task = NeedleTask(NeedleConfig(length=1024), public, sentences)
    encoder = Encoder(public, EncodeConfig(1024))
    for index in range(20):
        row = encoder.encode(task.episode(0, index).example("group"))
        assert not isinstance(row, str), row
        assert 0.95 * 1024 <= len(row.tokens) <= 1024
        assert row.tokens[-1] == public.end_of_turn_id


def test_ids_are_those_of_the_text(task, tokenizer):
    for index in range(50):
        episode = task.episode(1, index)
        assert episode.prompt_ids == tokenizer.encode(episode.prompt)


def test_episode_is_a_pure_function(task, tokenizer, sentences):
    again = NeedleTask(task.config, tokenizer, sentences)
    wanted = [task.episode(5, index) for index in range(4)]
    assert [again.episode(5, index) for index in reversed(range(4))] == wanted[::-1]
    assert task.episode(6, 0) != wanted[0]


def test_context_is_filler_and_needles_only(tokenizer, sentences):
    task = NeedleTask(NeedleConfig(length=300), tokenizer, sentences)
    for index in range(20):
        context = re.fullmatch(ONE, task.episode(0, index).prompt, re.DOTALL)["context"]
        *whole, last = re.split(r"(?<=\.) ", re.sub(f" ?{NEEDLE}", "", context).strip())
        assert set(whole) <= set(sentences)
        assert any(sentence.startswith(last) for sentence in sentences)


def test_repeated_haystack_has_one_unit_a_line(tokenizer):
    task = NeedleTask(NeedleConfig(length=256, haystack="repeat"), tokenizer)
    context = re.fullmatch(ONE, task.episode(0, 0).prompt, re.DOTALL)["context"]
    lines = [line for line in context.split("\n") if not re.fullmatch(NEEDLE, line)]
    assert len(lines) > 2 and set(lines[:-1]) == {REPEATED}
    assert REPEATED.startswith(lines[-1])


def test_depth_is_spread_over_the_context(tokenizer, sentences):
    task = NeedleTask(NeedleConfig(length=512), tokenizer, sentences)
    depths = np.array([task.episode(0, index).depth for index in range(300)])
    assert 0 <= depths.min() < 0.05 and 0.9 < depths.max() < 1
    assert 0.4 < depths.mean() < 0.55


@pytest.mark.parametrize("key_words", [1, 2])
def test_key_words_of_splits_are_disjoint(key_words):
    train, validation, test = (
        [set(words) for words in key_parts(key_words, split)]
        for split in ("train", "validation", "test")
    )
    for part in range(key_words):
        everything = len(train[part] | validation[part] | test[part])
        assert everything == len(train[part]) + len(validation[part]) + len(test[part])
        assert 0.75 < len(train[part]) / everything < 0.85
        assert len(test[part]) > 50


def test_score_is_rulers():
    assert string_match_all(" The answer: 123 and 45", ["123", "456"]) == 0.5
    assert string_match_all("YES\x00", ["yes"]) == 1.0
    assert string_match_all("12\x003", ["123"]) == 0.0
    with pytest.raises(ValueError, match="references is empty"):
        string_match_all("x", [])


def test_chance_floor():
    assert chance_floor(NeedleConfig(num_keys=4)) == 0.25


def test_filler_with_digits_is_left_out(tokenizer):
    assert len(Filler(["no digits here", "call 911 now"], tokenizer)) == 1


@pytest.mark.parametrize("budget", [-1, 0, 1, 7, 40, 333])
def test_filler_never_exceeds_its_budget(tokenizer, sentences, budget):
    filler = Filler(sentences, tokenizer)
    for start in range(len(filler)):
        pieces = filler.take(start, budget)
        assert sum(len(piece.ids) for piece in pieces) <= max(budget, 0)
        assert all(piece.ids == tokenizer.encode(" " + piece.text) for piece in pieces)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"length": 0}, "length=0 must be an integer of at least 1"),
        ({"num_keys": -1}, "num_keys=-1"),
        ({"num_keys": 41}, "must be at most 40"),
        ({"num_keys": 10, "value_digits": 1}, "9 .numbers of 1 digits"),
        ({"key_words": 3}, "key_words=3 must be 1 or 2"),
        ({"haystack": "essay"}, "haystack='essay' must be one of text, repeat"),
        ({"template": "long"}, "template='long' must be one of ruler, short"),
        ({"split": "dev"}, "split='dev' must be one of train, validation, test"),
    ],
)
def test_bad_config_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        NeedleConfig(**kwargs)


def test_too_short_a_length_and_no_filler_are_named(tokenizer, sentences):
    with pytest.raises(ValueError, match=r"length=64 must be at least \d+"):
        NeedleTask(NeedleConfig(length=64), tokenizer, sentences)
    with pytest.raises(ValueError, match="filler"):
        NeedleTask(NeedleConfig(), tokenizer, [])

"""Rows: the template, the asymmetric mask, and what happens to examples that are too long."""

import numpy as np
import pytest

from memdlm_jax.data.example import TURN_TOKENS, Example
from memdlm_jax.data.needles import NeedleConfig, NeedleTask
from memdlm_jax.data.sft import EncodeConfig, Encoder
from memdlm_jax.data.sources import needle_examples

TURNS = (("user", "one two three"), ("assistant", "four"), ("user", "five six"))


def spell(tokenizer, ids):
    return tokenizer.decode(ids, skip_special=False)


@pytest.mark.parametrize(
    ("prompt", "spelled"),
    [
        ("Hi", "<|user|>Hi<|eos|><|assistant|>"),
        ("", ""),
        ((("text", "Once upon"),), "Once upon"),
        (
            TURNS,
            "<|user|>one two three<|eos|><|assistant|>four<|eos|><|user|>five six<|eos|>"
            "<|assistant|>",
        ),
    ],
)
def test_template(tokenizer, prompt, spelled):
    row = Encoder(tokenizer, EncodeConfig(64)).encode(Example(prompt, " so be it", "g", "s"))
    assert row.tokens.dtype == np.int32
    assert spell(tokenizer, row.tokens[: row.prompt_length]) == spelled
    assert spell(tokenizer, row.tokens[row.prompt_length :]) == " so be it<|eos|>"


def test_text_cannot_forge_a_turn(tokenizer):
    row = Encoder(tokenizer, EncodeConfig(64)).encode(
        Example("<|eos|><|mask|>", "<|eos|>", "g", "s")
    )
    assert list(row.tokens[np.isin(row.tokens, range(5))]) == [3, 2, 4, 2]


def test_long_prompts_are_dropped_or_lose_whole_old_turns(tokenizer):
    example = Example(TURNS, "seven", "g", "s")
    full = len(Encoder(tokenizer, EncodeConfig(256)).encode(example).tokens)
    assert Encoder(tokenizer, EncodeConfig(full - 1)).encode(example) == "prompt_too_long"
    shorter = Encoder(tokenizer, EncodeConfig(full - 1, "truncate_left")).encode(example)
    assert spell(tokenizer, shorter.tokens).startswith("<|assistant|>four<|eos|><|user|>five six")
    assert shorter.tokens[shorter.prompt_length - 1] == tokenizer.assistant_id


def test_the_last_turn_is_never_cut(tokenizer):
    example = Example((("user", "word " * 100),), "yes", "g", "s")
    encoder = Encoder(tokenizer, EncodeConfig(32, "truncate_left"))
    assert encoder.encode(example) == "prompt_too_long"


def test_a_response_that_is_too_long_is_dropped_or_stops(tokenizer):
    example = Example("Hi", "word " * 100, "g", "s")
    assert Encoder(tokenizer, EncodeConfig(32)).encode(example) == "response_too_long"
    with pytest.raises(
        ValueError, match=r"response of group 'g' \(s\) takes \d+ ids, max_length=32"
    ):
        Encoder(tokenizer, EncodeConfig(32, long_response="error")).encode(example)


def test_a_row_may_fill_max_length_exactly(tokenizer):
    example = Example("Hi there", "yes", "g", "s")
    length = len(Encoder(tokenizer, EncodeConfig(64)).encode(example).tokens)
    assert len(Encoder(tokenizer, EncodeConfig(length)).encode(example).tokens) == length


def test_needle_rows_keep_their_length(tokenizer, sentences):
    task = NeedleTask(NeedleConfig(length=256), tokenizer, sentences)
    encoder = Encoder(tokenizer, EncodeConfig(256))
    for index, example in enumerate(needle_examples(task, 0, 20)):
        row = encoder.encode(example)
        assert 0.95 * 256 <= len(row.tokens) <= 256
        assert row.prompt_length == len(task.episode(0, index).prompt_ids) + TURN_TOKENS - 1


def test_the_given_start_of_a_response_is_never_masked(tokenizer):
    example = Example("Where?", " here", "g", "s", prefix=" It is")
    row = Encoder(tokenizer, EncodeConfig(64)).encode(example)
    assert spell(tokenizer, row.tokens) == "<|user|>Where?<|eos|><|assistant|> It is here<|eos|>"
    assert spell(tokenizer, row.tokens[row.prompt_length :]) == " here<|eos|>"


@pytest.mark.parametrize("template", ["ruler", "short"])
def test_a_needle_row_reads_as_rulers_prompt(tokenizer, sentences, template):
    task = NeedleTask(NeedleConfig(length=256, template=template), tokenizer, sentences)
    encoder = Encoder(tokenizer, EncodeConfig(256))
    for index in range(10):
        episode = task.episode(2, index)
        row = encoder.encode(episode.example("g"))
        before, after = episode.prompt[: -len(episode.prefix) - 1], episode.prefix
        assert before + episode.prompt[len(before)] + after == episode.prompt
        assert spell(tokenizer, row.tokens) == (
            f"<|user|>{before}<|eos|><|assistant|> {after}{episode.response}<|eos|>"
        )
        assert spell(tokenizer, row.tokens[row.prompt_length :]) == f"{episode.response}<|eos|>"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_length": 0}, "max_length=0 must be an integer of at least 8"),
        ({"max_length": -3}, "max_length=-3"),
        ({"long_prompt": "cut"}, "long_prompt='cut' must be one of drop, truncate_left"),
        ({"long_response": "cut"}, "long_response='cut' must be one of drop, error"),
    ],
)
def test_bad_config_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        EncodeConfig(**kwargs)

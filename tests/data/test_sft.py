"""Rows: the template, the asymmetric mask, and what happens to examples that are too long."""

import json
from pathlib import Path

import numpy as np
import pytest

from memdlm_jax.data import chat
from memdlm_jax.data.example import TURN_TOKENS, Example
from memdlm_jax.data.needles import NeedleConfig, NeedleTask
from memdlm_jax.data.sft import EncodeConfig, Encoder
from memdlm_jax.data.sources import needle_examples
from memdlm_jax.data.tokenizer import SpecialTokens, Tokenizer

TURNS = (("user", "one two three"), ("assistant", "four"), ("user", "five six"))

LLADA = Path(__file__).parents[1] / "golden" / "tokenizer_llada"
GOLDEN = json.loads((LLADA / "golden_tokenizer.json").read_text())


@pytest.fixture(scope="module", params=["published", "fixed"])
def llada(request) -> Tokenizer:
    return Tokenizer.load(LLADA, chat_template=chat.LLADA if request.param == "fixed" else None)


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


def test_the_prompt_of_a_public_tokenizer_is_as_recorded(llada):
    """The reference run's second conversation has a system turn, which examples do not."""
    case = GOLDEN["chat"][0]
    prompt = case["messages"][0]["content"]
    row = Encoder(llada, EncodeConfig(64)).encode(Example(prompt, " She runs.", "g", "s"))
    assert row.tokens[: row.prompt_length].tolist() == case["ids_add_gen_true"]
    assert spell(llada, row.tokens[row.prompt_length :]) == " She runs.<|eot_id|>"


def turn(role, text):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}"


def test_a_template_loses_whole_old_turns_and_opens_with_the_user(llada):
    example = Example((*TURNS, ("assistant", "ok"), ("user", "why")), "so", "g", "s", prefix=" Is")
    full = Encoder(llada, EncodeConfig(256)).encode(example)
    dropped = Encoder(llada, EncodeConfig(len(full.tokens) - 1)).encode(example)
    assert dropped == "prompt_too_long"
    encoder = Encoder(llada, EncodeConfig(len(full.tokens) - 1, "truncate_left"))
    row = encoder.encode(example)
    assert spell(llada, row.tokens[: row.prompt_length]) == (
        "<|startoftext|>"
        + turn("user", "five six<|eot_id|>")
        + turn("assistant", "ok<|eot_id|>")
        + turn("user", "why<|eot_id|>")
        + turn("assistant", " Is")
    )
    assert spell(llada, row.tokens[row.prompt_length :]) == "so<|eot_id|>"
    exact = Encoder(llada, EncodeConfig(len(row.tokens), "truncate_left")).encode(example)
    assert exact.tokens.tolist() == row.tokens.tolist()
    shorter = Encoder(llada, EncodeConfig(len(row.tokens) - 1, "truncate_left")).encode(example)
    assert spell(llada, shorter.tokens).startswith("<|startoftext|>" + turn("user", "why"))
    tiny = EncodeConfig(len(shorter.tokens) - 1, "truncate_left")
    assert Encoder(llada, tiny).encode(example) == "prompt_too_long"


def test_a_template_leaves_bare_text_alone(llada):
    encoder = Encoder(llada, EncodeConfig(64))
    for prompt, spelled in (("", ""), ((("text", "Once upon"),), "Once upon")):
        row = encoder.encode(Example(prompt, " a time", "g", "s"))
        assert spell(llada, row.tokens[: row.prompt_length]) == spelled
        assert spell(llada, row.tokens[row.prompt_length :]) == " a time<|endoftext|>"
    mixed = Example((("text", "Once"), ("user", "Hi")), "yes", "g", "s")
    with pytest.raises(ValueError, match="mix the role 'text' with turns"):
        encoder.encode(mixed)


def test_no_text_forges_a_special_token_of_a_public_tokenizer(llada):
    forged = "a<|eot_id|><|mdm_mask|><|start_header_id|>b"
    row = Encoder(llada, EncodeConfig(256)).encode(Example(forged, forged, "g", "s", prefix=forged))
    special = sorted(GOLDEN["special_ids"].values())
    found = [llada.token(i) for i in row.tokens if i in special]
    header = ["<|start_header_id|>", "<|end_header_id|>"]
    assert found == ["<|startoftext|>", *header, "<|eot_id|>", *header, "<|eot_id|>"]
    assert spell(llada, row.tokens).count(forged) == 3


def test_a_tokenizer_that_can_open_no_turn_says_what_to_give():
    bare = Tokenizer.load(LLADA, chat_template="")
    encoder = Encoder(bare, EncodeConfig(64))
    with pytest.raises(ValueError, match=r"SpecialTokens\(user=\.\.\., assistant=\.\.\.\)"):
        encoder.encode(Example("Hi", "yes", "g", "s"))
    given = SpecialTokens(user="<role>", assistant="</role>")
    row = Encoder(Tokenizer.load(LLADA, given, chat_template=""), EncodeConfig(64)).encode(
        Example("Hi", "yes", "g", "s")
    )
    assert spell(bare, row.tokens) == "<role>Hi<|endoftext|></role>yes<|endoftext|>"


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

"""RULER samples: they fill any length for any tokenizer, and reading the prompt answers them."""

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from memdlm_jax.data.needles import key_parts
from memdlm_jax.data.sft import EncodeConfig, Encoder
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.evaluation.ruler import (
    TASKS,
    RulerConfig,
    RulerTask,
    TokenCounter,
    oracle,
    string_match_part,
)

BUDGETS = {"ruler_vt": 30, "ruler_cwe": 120, "ruler_fwe": 50}
BUDGETS |= {"ruler_qa_squad": 32, "ruler_qa_hotpot": 32}
LONGEST = 131_072


def words(text):
    return text.split()


def quarters(text):
    """Four characters a token, whatever they are: pieces merge wherever they meet."""
    return range(-(-len(text) // 4))


def opened(text):
    """Characters, with a token for the start of every text."""
    return ["<s>", *text]


@pytest.fixture(scope="module")
def counters(tokenizer):
    kinds = {"bpe": tokenizer, "words": words, "quarters": quarters, "opened": opened}
    return {name: TokenCounter(kind) for name, kind in kinds.items()}


def lengths_of(task, least):
    """Lengths at which a task fits; from 4,096 on common words are others."""
    wanted = [least, least + 9, least + 40, int(1.6 * least), 9000]
    return [n for n in wanted if task != "ruler_cwe" or least >= 4096 or n < 4096]


def least_length(task, counter, sentences, length=4000):
    return RulerTask(RulerConfig(task, length=length), counter, sentences=sentences).least_length


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["bpe", "words", "quarters", "opened"])
def test_length_is_filled_and_the_oracle_is_right(task, kind, counters, sentences):
    counter = counters[kind]
    for length in lengths_of(task, least_length(task, counter, sentences)):
        for seed in range(2):
            ruler = RulerTask(RulerConfig(task, length, seed), counter, sentences=sentences)
            sample = ruler.sample(seed)
            tokens = counter.count(sample.prompt)
            assert sample.length == tokens + BUDGETS.get(task, 128)
            assert 0.95 * length <= sample.length <= length
            assert ruler.max_new_tokens == BUDGETS.get(task, 128)
            assert ruler.score(sample, oracle(task, sample.prompt)) == 1.0
            assert ruler.score(sample, sample.response) == 1.0
            assert ruler.score(sample, "I do not know.") == 0.0
            assert sample.response_tokens == counter.piece(sample.response)
            assert sample.prompt.endswith(sample.prefix)


@pytest.mark.parametrize("task", TASKS)
def test_a_length_below_the_least_is_named(task, counters, sentences):
    counter = counters["words"]
    least = least_length(task, counter, sentences)
    sample = RulerTask(RulerConfig(task, least), counter, sentences=sentences).sample(0)
    assert sample.length <= least
    with pytest.raises(ValueError, match=rf"length={least - 1} must be at least {least} for"):
        RulerTask(RulerConfig(task, least - 1), counter, sentences=sentences)


def test_common_words_of_long_prompts_have_their_own_least(counters):
    ruler = RulerTask(RulerConfig("ruler_cwe", 9000), counters["bpe"])
    assert 4096 < ruler.least_length < 9000
    with pytest.raises(ValueError, match=f"length=4096 must be at least {ruler.least_length} for"):
        RulerTask(RulerConfig("ruler_cwe", 4096), counters["bpe"])


@pytest.mark.parametrize("task", ["niah_multikey_3", "niah_multivalue", "ruler_vt", "ruler_cwe"])
def test_the_longest_prompts_are_filled(task, counters, sentences):
    ruler = RulerTask(RulerConfig(task, LONGEST), counters["words"], sentences=sentences)
    sample = ruler.sample(0)
    assert 0.99 * LONGEST <= sample.length <= LONGEST
    assert ruler.score(sample, oracle(task, sample.prompt)) == 1.0
    # Two words an entry are more entries than the lists have words.
    assert sample.is_standard == (task != "ruler_cwe") and ruler.is_standard


def test_long_prompts_are_about_different_people(counters):
    for task, lines in {"ruler_qa_squad": 1, "ruler_qa_hotpot": 2}.items():
        sample = RulerTask(RulerConfig(task, LONGEST), counters["words"]).sample(0)
        body = sample.prompt.split("given documents.\n\n")[1].split("\n\nAnswer the question")[0]
        texts = re.split(r"(?:^|\n\n)Document \d+:\n", body)[1:]
        subjects = [text.split(" was born" if lines == 1 else "\n")[0] for text in texts]
        assert len(set(subjects)) == len(subjects) > 4000
        lives = re.findall(r"born in (\S+) in \d+\..* workshop in (\S+) in", body)
        assert len(lives) >= (len(texts) - 1 if lines == 1 else 0)
        assert all(birth != work for birth, work in lives)


def test_every_town_has_people(counters):
    ruler = RulerTask(RulerConfig("ruler_qa_hotpot", 1000), counters["words"])
    for index in range(10):
        prompt = ruler.sample(index).prompt
        name = re.findall(r"in which (\S+ \S+) was born", prompt)[0]
        town = re.findall(rf"{name} was born in (\S+)", prompt)[0]
        assert len(re.findall(rf"was born in {town} and", prompt)) == 3
        towns = re.findall(r"(\S+) is a town on the river", prompt)
        assert [len(re.findall(rf"was born in {t} ", prompt)) for t in towns].count(3) > 3


def test_small_lengths_fit_with_the_small_settings(counters, sentences):
    small = {
        "niah_single_2": {"value_digits": 3, "max_new_tokens": 8},
        "niah_multivalue": {"num_values": 2, "max_new_tokens": 8},
        "ruler_vt": {"num_hops": 2, "with_example": False},
        "ruler_cwe": {"num_common": 3, "with_example": False, "max_new_tokens": 12},
    }
    for task, settings in small.items():
        ruler = RulerTask(RulerConfig(task, 128, **settings), words, sentences=sentences)
        sample = ruler.sample(0)
        assert 0.95 * 128 <= sample.length <= 128
        assert ruler.score(sample, oracle(task, sample.prompt)) == 1.0
        assert not sample.is_standard and not ruler.is_standard
        assert ruler.max_new_tokens == settings.get("max_new_tokens", 30)


@pytest.mark.parametrize("task", TASKS)
def test_sample_is_a_pure_function(task, counters, sentences):
    def make(**changes):
        config = dataclasses.replace(RulerConfig(task, 3000), **changes)
        return RulerTask(config, counters["words"], sentences=sentences)

    wanted = [make().sample(index) for index in range(4)]
    again = make()
    assert [again.sample(index) for index in reversed(range(4))] == wanted[::-1]
    asked = [s.references for s in wanted]
    others = [make(seed=1), make(length=3001), make(reserved_tokens=1)]
    asked += [ruler.sample(index).references for ruler in others for index in range(4)]
    if task.startswith("ruler_qa"):  # Years and trades repeat, questions do not.
        asked = [s.prompt.splitlines()[-1] for s in wanted]
        asked += [r.sample(i).prompt.splitlines()[-1] for r in others for i in range(4)]
    assert len(set(asked)) == len(asked) == 16


def test_tasks_do_not_share_questions(counters, sentences):
    values = [
        reference
        for task in TASKS[:8]
        for index in range(5)
        for reference in RulerTask(RulerConfig(task, 1000), counters["words"], sentences=sentences)
        .sample(index)
        .references
    ]
    assert len(values) == 5 * (6 + 4 + 4) == len(set(values))


def test_settings_of_the_definition_are_the_standard(counters, sentences):
    given = RulerConfig("niah_multivalue", 1000, num_values=4, value_digits=7, max_new_tokens=128)
    plain = RulerConfig("niah_multivalue", 1000)
    first, second = (
        RulerTask(config, counters["words"], sentences=sentences).sample(3)
        for config in (given, plain)
    )
    assert first == second and first.is_standard
    assert RulerConfig("niah_single_1", depth=50).settings["depth"] == 50.0
    at = [
        RulerTask(RulerConfig("niah_single_1", 900, depth=d), words).sample(0) for d in (50, 50.0)
    ]
    assert at[0] == at[1] and not at[0].is_standard


def test_which_samples_are_standard(counters, sentences):
    for task in TASKS:
        ruler = RulerTask(RulerConfig(task, 3000), counters["words"], sentences=sentences)
        assert ruler.is_standard == ruler.sample(0).is_standard == (not task.startswith("ruler_qa"))
    held_out = RulerConfig("niah_single_1", 900, key_split="test", reserved_tokens=5)
    assert not RulerTask(held_out, words).is_standard
    assert RulerTask(dataclasses.replace(held_out, key_split=None), words).is_standard


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_3"])
@pytest.mark.parametrize("depth", [0, 30, 77.5, 100])
def test_depth_can_be_fixed(task, depth, counters, sentences):
    for index in range(5):
        config = RulerConfig(task, 3000, depth=depth)
        ruler = RulerTask(config, counters["words"], sentences=sentences)
        (found,) = ruler.sample(index).depths
        # Half a sentence, and the needle itself.
        assert abs(found - depth / 100) < 0.01


def test_depth_of_the_asked_needle_alone_is_fixed(counters, sentences):
    config = RulerConfig("niah_multikey_1", 3000, depth=50)
    ruler = RulerTask(config, counters["words"], sentences=sentences)
    unasked = []
    for index in range(20):
        sample = ruler.sample(index)
        assert len(sample.depths) == 1 and abs(sample.depths[0] - 0.5) < 0.02
        text = sample.prompt
        places = [m.start() / len(text) for m in re.finditer(r"One of the special", text)]
        asked = text.index(f"{sample.references[0]}.") / len(text)
        assert len(places) == 4
        unasked += sorted(places, key=lambda place: abs(place - asked))[1:]
    assert min(unasked) < 0.1 and max(unasked) > 0.85 and np.std(unasked) > 0.2


def test_first_and_last_are_first_and_last(sentences):
    for depth in (0, 100):
        config = RulerConfig("niah_multikey_1", 1000, depth=depth)
        ruler = RulerTask(config, words, sentences=sentences)
        for index in range(5):
            sample = ruler.sample(index)
            context = sample.prompt.split("afterwards.\n")[1].split("\nWhat is")[0]
            needles = re.findall(r"One of the special [^.]*\.", context)
            asked = next(needle for needle in needles if sample.references[0] in needle)
            assert context.startswith(asked) if depth == 0 else context.endswith(asked)


def test_drawn_depths_are_spread(counters, sentences):
    for task in ("niah_single_1", "niah_single_2", "niah_multikey_2"):
        ruler = RulerTask(RulerConfig(task, 1000), counters["words"], sentences=sentences)
        depths = np.array([ruler.sample(index).depths[0] for index in range(150)])
        assert 0 <= depths.min() < 0.06 and 0.9 < depths.max() < 1
        assert 0.4 < depths.mean() < 0.6


def test_depths_are_in_the_order_of_the_context(counters, sentences):
    for task, count in {"niah_multiquery": 4, "ruler_vt": 5, "ruler_qa_hotpot": 2}.items():
        ruler = RulerTask(RulerConfig(task, 2000), counters["words"], sentences=sentences)
        for index in range(5):
            depths = ruler.sample(index).depths
            assert len(depths) == count and list(depths) == sorted(depths)
            assert all(type(d) is float and 0 <= d < 1 for d in depths)


def test_keys_of_a_split_are_its_own(counters, sentences):
    adjectives, nouns = key_parts(2, "test")
    config = RulerConfig("niah_multiquery", 1000, key_split="test")
    ruler = RulerTask(config, counters["words"], sentences=sentences)
    allowed = {f"{a}-{n}" for a, n in itertools.product(adjectives, nouns)}
    for index in range(10):
        query = ruler.sample(index).prefix.removeprefix("The special magic numbers for ")
        keys = query.removesuffix(" mentioned in the provided text are").replace("and ", "")
        assert set(keys.split(", ")) <= allowed


def test_rows_under_a_chat_template_fit(sentences):
    folder = Path(__file__).parents[1] / "golden" / "tokenizer_llada"
    public = Tokenizer.load(folder)
    encoder = Encoder(public, EncodeConfig(2048))
    for task in ("niah_multivalue", "ruler_vt", "ruler_qa_squad"):
        config = RulerConfig(task, 2048, reserved_tokens=public.turn_tokens)
        ruler = RulerTask(config, public, sentences=sentences)
        for index in range(5):
            sample = ruler.sample(index)
            example = sample.example("group")
            assert example.prefix == " " + sample.prefix and example.source == "ruler"
            assert sample.prompt.startswith(example.prompt) and not example.prompt.endswith(" ")
            row = encoder.encode(example)
            assert not isinstance(row, str), row
            assert sample.response_tokens <= ruler.max_new_tokens
            assert len(row.tokens) - sample.response_tokens + ruler.max_new_tokens <= 2048
            assert 0.95 * 2048 <= sample.length <= 2048


def test_score_of_questions_is_the_best_reference():
    assert string_match_part(" It was PARIS.", ["Paris", "the city"]) == 1.0
    assert string_match_part("Rome", ["Paris", "the city"]) == 0.0
    assert string_match_part("12\x003", ["123"]) == 0.0
    with pytest.raises(ValueError, match="references is empty"):
        string_match_part("x", [])


def test_score_of_the_other_tasks_is_the_share(counters, sentences):
    ruler = RulerTask(RulerConfig("niah_multiquery", 900), counters["words"], sentences=sentences)
    sample = ruler.sample(0)
    for count in range(5):
        assert ruler.score(sample, " ".join(sample.references[:count])) == count / 4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"task": "niah_single_4"}, "task='niah_single_4' must be one of niah_single_1, "),
        ({"length": 0}, "length=0 must be an integer of at least 1"),
        ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
        ({"reserved_tokens": -1}, "reserved_tokens=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"num_hops": 3}, "num_hops=3 is no setting of niah_single_1, which has max_new_tokens"),
        ({"with_example": False}, "with_example=False is no setting of niah_single_1"),
        ({"depth": 101}, r"depth=101 must lie in \[0, 100\]"),
        ({"key_split": "dev"}, "key_split='dev' must be one of train, validation, test"),
        ({"value_digits": 0}, "value_digits=0"),
        ({"task": "niah_multivalue", "num_values": 41}, "make 41 needles: at most 40"),
        ({"task": "niah_multikey_1", "num_keys": 10, "value_digits": 1}, "gives 9 numbers"),
        ({"task": "niah_single_3", "value_digits": 3}, "value_digits=3 is no setting"),
        ({"task": "ruler_vt", "num_hops": 0}, "num_hops=0"),
        ({"task": "ruler_vt", "depth": 50}, "depth=50 is no setting of ruler_vt"),
        ({"task": "ruler_cwe", "with_example": "no"}, "with_example='no' must be True or False"),
        ({"task": "ruler_fwe", "num_common": 3}, "num_common=3 is no setting of ruler_fwe"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RulerConfig(**{"task": "niah_single_1"} | kwargs)


def test_bad_material_is_named(counters):
    text = RulerConfig("niah_single_2", 1000)
    with pytest.raises(ValueError, match="of 0 sentences none is free of digits"):
        RulerTask(text, words)
    with pytest.raises(ValueError, match="of 1 sentences none"):
        RulerTask(text, words, sentences=["It was 1984."])
    with pytest.raises(TypeError, match="sentences is one string"):
        RulerTask(text, words, sentences="It was cold.")
    with pytest.raises(TypeError, match="must have encode"):
        RulerTask(text, "gpt2")
    for broken in (lambda text: [], lambda text: {"input_ids": [], "attention_mask": []}):
        with pytest.raises(ValueError, match="lengths cannot be measured"):
            RulerTask(text, broken)
    with pytest.raises(ValueError, match="num_common=5000 must be at most"):
        RulerTask(RulerConfig("ruler_cwe", 4000, num_common=5000), words)
    with pytest.raises(ValueError, match="index=-1"):
        RulerTask(RulerConfig("niah_single_1", 1000), counters["words"]).sample(-1)
    with pytest.raises(ValueError, match=r"can fill .* less than 95%: give more sentences of"):
        RulerTask(RulerConfig("niah_single_2", 900), opened, sentences=["a" * 600]).sample(0)


def test_digits_of_the_haystack_are_left_out(counters):
    mixed = ["It was 1984 then.", "The cold came early.", "Nobody had seen it."]
    ruler = RulerTask(RulerConfig("niah_single_2", 500), counters["words"], sentences=mixed)
    prompt = ruler.sample(0).prompt
    assert "1984" not in prompt and "The cold came early." in prompt


def test_oracle_refuses_what_it_does_not_read():
    with pytest.raises(ValueError, match="nothing that reads"):
        oracle("ruler_vt", "What is the special magic number for a-b mentioned in the text?")
    with pytest.raises(ValueError, match="is none about local documents"):
        oracle("ruler_qa_squad", "...\nQuestion: Who wrote Emma? Answer:")

"""BABILong: facts in their order in real text, exact lengths, both scores, original files."""

import json
import pydoc_data.topics
import re
from pathlib import Path

import numpy as np
import pytest

from memdlm_jax.data.filler import Filler
from memdlm_jax.data.tokenizer import Tokenizer, train_tokenizer
from memdlm_jax.evaluation.babi import TASKS, format_prompt
from memdlm_jax.evaluation.babilong import (
    BabilongConfig,
    BabilongSample,
    BabilongTask,
    load_folder,
    majority_floor,
    score,
)
from tests.evaluation import babi_solver
from tests.evaluation.babi_solver import solve


def prose() -> list[str]:
    """Plain English from the standard library; no sentence of it is a fact."""
    found = re.findall(
        r"[A-Z][a-z][a-z ,]+\.",
        re.sub(r"\s+", " ", " ".join(pydoc_data.topics.topics.values())),
    )
    return [sentence for sentence in found if 20 < len(sentence) < 300]


@pytest.fixture(scope="module")
def text() -> list[str]:
    sentences = prose()
    assert len(sentences) > 300 and not babi_solver.facts_of(" ".join(sentences))
    return sentences


@pytest.fixture(scope="module")
def tokenizers(text) -> dict[str, Tokenizer]:
    """Words of the task are few tokens, bytes, or those of a public tokenizer."""
    golden = Path(__file__).parents[1] / "golden" / "tokenizer_llada"
    task = [format_prompt(task, "", "") for task in TASKS] * 20
    return {
        "words": train_tokenizer([*text, *task], 2_000, whole_numbers=False),
        "bytes": train_tokenizer(text, 262, whole_numbers=False),
        "public": Tokenizer.load(golden),
    }


@pytest.fixture(scope="module")
def words(tokenizers) -> Tokenizer:
    return tokenizers["words"]


# Samples.


def build(task, length, tokenizer, filler, **settings) -> BabilongTask:
    return BabilongTask(BabilongConfig(task, length, **settings), tokenizer, filler)


def context_of(sample) -> str:
    return sample.prompt.split("\n\n")[-1].rsplit("\n", 1)[0]


def check_length(sample, task, tokenizer):
    tokens = len(tokenizer.encode(sample.prompt)) + task.max_new_tokens
    assert sample.length == tokens
    assert 0.95 * task.config.length <= tokens <= task.config.length


def most_left(tokenizer, sentences) -> int:
    """Less than a word, and 3 tokens that a fact or a sentence may save by opening the context."""
    return 3 + max(len(tokenizer.encode(f" {word}")) for s in sentences for word in s.split(" "))


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """A text whose sentences, whole or cut, can be told apart: each opens with its own number."""
    letters = "abcdefghij"
    tail = re.split(" ", "the water of the brook ran slowly past the old mill and under the bridge")
    return [
        f"Line {letters[i // 10]}{letters[i % 10]} says that {' '.join(tail[: 4 + i % 11])}."
        for i in range(100)
    ]


LENGTHS = {"words": (512, 700, 2048), "public": (1600, 3000), "bytes": (3000, 8192)}
CELLS = [(name, length) for name, lengths in LENGTHS.items() for length in lengths]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("name", "length"), CELLS)
def test_samples_fill_their_length_and_are_answered(task, name, length, tokenizers, text):
    tokenizer = tokenizers[name]
    most = most_left(tokenizer, text)
    cell = build(task, length, tokenizer, text, max_new_tokens=16 if name == "words" else 40)
    for index in range(5):
        sample = cell.sample(index)
        check_length(sample, cell, tokenizer)
        assert length - sample.length <= most
        assert solve(sample.prompt) == sample.target
        start = format_prompt(task, "@", sample.question).partition("@")[0]
        assert sample.prompt.startswith(start)
        assert sample.prompt.endswith(f"\n{sample.question}")


def test_an_opening_that_costs_more_without_its_space_is_made_room_for(words):
    filler = Filler(["replacement of the names."], words)
    assert filler.extra_at_start(filler.sentence(0)) > 2
    cell = build("qa1", 512, words, filler)
    samples = [cell.sample(index) for index in range(20)]
    assert any(sample.positions[0] for sample in samples)
    for sample in samples:
        check_length(sample, cell, words)
        assert 512 - sample.length <= 4


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("task", TASKS)
def test_facts_keep_their_order_and_place_in_the_text(task, name, tokenizers, lines):
    cell = build(task, LENGTHS[name][-1], tokenizers[name], lines)
    letters, most = "abcdefghij", most_left(tokenizers[name], lines)
    for index in range(8):
        sample = cell.sample(index)
        check_length(sample, cell, tokenizers[name])
        assert cell.config.length - sample.length <= most
        context = context_of(sample)
        assert tuple(babi_solver.facts_of(context)) == sample.facts
        before, rest = [], context
        for fact in sample.facts:
            head, _, rest = rest.partition(fact)
            before.append(head.count("Line"))
        assert tuple(np.cumsum(before)) == sample.positions
        assert context.count("Line") == sample.num_filler
        for fact in sample.facts:
            context = context.replace(fact, "", 1)
        # In the order of the source, round its end, but for what was cut to fill the length.
        whole = re.findall(r"Line (\w\w) says that [a-z ]+\.", context)[: sample.num_filler - 2]
        places = [10 * letters.index(a) + letters.index(b) for a, b in whole]
        assert places == [(places[0] + i) % len(lines) for i in range(sample.num_filler - 2)]
        assert set(" ".join(context.split()).split(" ")) <= set(" ".join(lines).split(" "))


def test_places_are_drawn_uniformly_with_replacement(words, lines):
    cell = build("qa3", 2048, words, lines)
    samples = [cell.sample(index) for index in range(40)]
    depths = np.concatenate([np.array(s.positions) / s.num_filler for s in samples])
    assert min(depths) == 0 and max(depths) == 1
    counts, _ = np.histogram(depths, 5, (0, 1))
    assert counts.min() > 0.8 * len(depths) / 5
    assert any(len(set(s.positions)) < len(s.positions) for s in samples)


def test_starts_are_drawn_from_the_whole_text(words, lines):
    cell = build("qa1", 1024, words, lines)
    starts = {context_of(cell.sample(i)).partition("Line ")[2][:2] for i in range(60)}
    assert len(starts) > 30


@pytest.mark.parametrize("task", TASKS)
def test_without_filler_the_context_is_the_facts(task, words):
    sample = BabilongTask(BabilongConfig(task, length=0), words).sample(3)
    assert context_of(sample) == " ".join(sample.facts)
    assert sample.positions == (0,) * len(sample.facts)
    assert sample.num_filler == sample.passed_over == 0
    assert sample.length == len(words.encode(sample.prompt)) + 16
    assert solve(sample.prompt) == sample.target


def test_a_sample_is_a_pure_function(words, text):
    cells = [build("qa2", 1024, words, text, seed=4) for _ in range(2)]
    wanted = [cells[0].sample(index) for index in range(4)]
    assert [cells[1].sample(index) for index in reversed(range(4))] == wanted[::-1]
    shared = build("qa2", 1024, words, Filler(text, words), seed=4)
    assert shared.sample(0) == wanted[0]
    assert build("qa2", 1024, words, text, seed=5).sample(0).facts != wanted[0].facts
    assert len({sample.facts for sample in wanted}) == 4


def test_every_length_tells_the_same_story(words, text):
    tasks = [build("qa2", length, words, text) for length in (0, 2048, 4096)]
    for index in range(4):
        none, short, long = (task.sample(index) for task in tasks)
        assert none.facts == short.facts == long.facts
        assert none.question == short.question == long.question
        assert short.num_filler < long.num_filler


def test_stories_that_do_not_fit_are_passed_over_and_counted(words, text):
    tight, wide = (build("qa2", length, words, text) for length in (340, 4096))
    samples = [tight.sample(index) for index in range(60)]
    assert sum(sample.passed_over > 0 for sample in samples) > 5
    assert len({sample.prompt for sample in samples}) == len(samples)
    for index, sample in enumerate(samples):
        check_length(sample, tight, words)
        first = wide.sample(index)
        assert first.passed_over == 0
        assert (first.facts == sample.facts) == (sample.passed_over == 0)
        if sample.passed_over:
            bare = format_prompt("qa2", " ".join(first.facts), first.question)
            assert len(words.encode(bare)) + 16 > 340


def test_the_least_length_is_named_and_is_enough(words, text):
    with pytest.raises(ValueError, match=r"length=64 must be at least \d+") as error:
        build("qa3", 64, words, text)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    with pytest.raises(ValueError, match=f"length={least - 1} must be at least {least}"):
        build("qa3", least - 1, words, text)
    cell = build("qa3", least, words, text)
    check_length(cell.sample(0), cell, words)


def test_running_out_of_stories_is_named(words, text, monkeypatch):
    cell = build("qa2", 340, words, text)
    late = next(index for index in range(60) if cell.sample(index).passed_over)
    monkeypatch.setattr("memdlm_jax.evaluation.babilong._DRAWS", 1)
    with pytest.raises(ValueError, match=f"length=340 must be greater: 1 stories.* index {late}"):
        cell.sample(late)


def test_short_variants_fit_small_models(words, text):
    cell = build("qa3", 256, words, text, template="short", short_stories=True)
    for index in range(10):
        sample = cell.sample(index)
        check_length(sample, cell, words)
        assert solve(sample.prompt) == sample.target
        assert sample.prompt == f"{context_of(sample)}\n{sample.question}"


def test_filler_that_cannot_fill_is_named(words, text):
    with pytest.raises(ValueError, match="of 0 sentences none is free of digits"):
        build("qa1", 1024, words, ())
    cell = build("qa1", 1024, words, ["Q" + "zx" * 2000 + "."])
    with pytest.raises(ValueError, match="left more than 5% of length=1024 empty"):
        cell.sample(0)


def test_sample_is_a_row_of_one_turn(words):
    sample = BabilongTask(BabilongConfig("qa4", length=0), words).sample(0)
    row = sample.example("cell 0")
    assert (row.prompt, row.response, row.group) == (sample.prompt, sample.target, "cell 0")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"task": "qa6"}, "task='qa6' must be one of qa1, qa2, qa3, qa4, qa5"),
        ({"length": -1}, "length=-1 must be an integer of at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be an integer of at least 1"),
        ({"template": "long"}, "template='long' must be one of public, short"),
        ({"seed": -1}, "seed=-1"),
        ({"short_stories": True}, "short_stories=True is for qa3 alone"),
    ],
)
def test_bad_config_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        BabilongConfig(**kwargs)


def test_bad_index_is_named(words):
    with pytest.raises(ValueError, match="index=-1"):
        BabilongTask(BabilongConfig(length=0), words).sample(-1)


@pytest.mark.parametrize(
    ("kwargs", "standard"),
    [
        ({}, True),
        ({"length": 0, "seed": 3}, True),
        ({"template": "short"}, False),
        ({"task": "qa3", "short_stories": True}, False),
        ({"max_new_tokens": 32}, False),
    ],
)
def test_variants_are_told_from_the_definition(kwargs, standard):
    assert BabilongConfig(**kwargs).is_standard is standard


# Scores.


@pytest.mark.parametrize(
    ("reply", "contains", "strict"),
    [
        ("hallway", 1, 1),
        (" The milk is in the HALLWAY. It was in the garden before.", 1, 1),
        ("It was in the garden. Then in the hallway.", 1, 0),
        ("hallway or garden", 1, 0),
        ("From the kitchen to the hallway", 1, 1),
        ("the hall\x00way", 0, 0),
        ("hallway <example> garden", 1, 1),
        ("<context> hallway", 1, 0),
        ("kitchen", 0, 0),
        ("", 0, 0),
    ],
)
def test_scores(reply, contains, strict):
    sample = BabilongSample("qa3", "p", "Where was the milk before the kitchen?", "hallway")
    assert score(sample, reply) == {"contains": contains, "strict": strict}


def test_names_and_objects_are_the_labels_of_qa5(words):
    sample = BabilongSample("qa5", "p", "Who did Bill give the milk to?", "Fred")
    task = BabilongTask(BabilongConfig("qa5", 0), words)
    assert task.score(sample, "bill gave the milk to fred") == {"contains": 1, "strict": 1}
    assert task.score(sample, "Bill gave Fred the apple") == {"contains": 1, "strict": 0}
    assert task.score(sample, "Fred in the kitchen") == {"contains": 1, "strict": 1}


def test_floor_is_the_best_constant_answer():
    samples = [BabilongSample("qa1", "p", "q", target) for target in ("office", "garden") * 2]
    assert majority_floor(samples) == ("garden", 0.5)
    assert majority_floor([*samples, samples[0]]) == ("office", 0.6)
    with pytest.raises(ValueError, match="samples is empty"):
        majority_floor([])


# Original files.

ROWS = [
    {"input": " Mary went to the office. It rained.\n", "question": "Where is Mary? ",
     "target": "office"},
    {"input": "It rained.John went to the garden.", "question": "Where is John?",
     "target": "garden "},
]  # fmt: skip


@pytest.mark.parametrize("folder", ["data/qa1", "qa1"])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_original_samples_are_read(tmp_path, folder, suffix):
    (tmp_path / folder).mkdir(parents=True)
    rows = [json.dumps(row) for row in ROWS]
    content = "\n\n".join(rows) if suffix == "jsonl" else f"[{', '.join(rows)}]"
    (tmp_path / folder / f"4k.{suffix}").write_text(content)
    first, second = load_folder(tmp_path, "qa1", "4k")
    context = "Mary went to the office. It rained."
    assert first.prompt == format_prompt("qa1", context, "Where is Mary?")
    assert (first.task, first.question, first.target) == ("qa1", "Where is Mary?", "office")
    assert (first.facts, first.length) == ((), None)
    assert second.target == "garden"
    assert score(second, "garden") == {"contains": 1, "strict": 1}
    short = load_folder(tmp_path, "qa1", "4k", "short")[0]
    assert short.prompt == f"{context}\nWhere is Mary?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "4k.json: not valid JSON"),
        ('{"input": "x"}', "4k.json: must be a JSON list of samples, not dict"),
        ("[3]", "4k.json, sample 0: must be a JSON object, not int"),
        (json.dumps([*ROWS, {"question": "q", "target": "office"}]),
         "4k.json, sample 2: field 'input' is missing"),
        (json.dumps([ROWS[0] | {"question": " "}]), "sample 0: field 'question' is ' '"),
        (json.dumps([ROWS[0] | {"target": 3}]), "sample 0: field 'target' is 3, must be a non-emp"),
        (json.dumps([ROWS[0] | {"target": "Bill"}]),
         "sample 0: field 'target' is 'Bill', must be one of bathroom, bedroom"),
    ],
)  # fmt: skip
def test_malformed_files_are_named(tmp_path, content, message):
    (tmp_path / "qa1").mkdir()
    (tmp_path / "qa1" / "4k.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_folder(tmp_path, "qa1", "4k")


def test_malformed_line_missing_file_and_two_files_are_named(tmp_path):
    (tmp_path / "data" / "qa2").mkdir(parents=True)
    (tmp_path / "data" / "qa2" / "0k.jsonl").write_text(json.dumps(ROWS[0]) + "\n\n[}")
    with pytest.raises(ValueError, match=r"0k\.jsonl:3: not valid JSON"):
        load_folder(tmp_path, "qa2", "0k")
    with pytest.raises(FileNotFoundError, match=r"no BABILong file at any of .*qa2/1k\.json"):
        load_folder(tmp_path, "qa2", "1k")
    (tmp_path / "data" / "qa2" / "0k.json").write_text("[]")
    with pytest.raises(ValueError, match="one file of qa2 at 0k is needed"):
        load_folder(tmp_path, "qa2", "0k")
    with pytest.raises(ValueError, match="task='qa7'"):
        load_folder(tmp_path, "qa7", "0k")

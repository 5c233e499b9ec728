import dataclasses
import json

import pytest

from memdlm_jax.data.example import Example
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation import asking
from memdlm_jax.evaluation import systems as library
from memdlm_jax.evaluation.asking import Answers, Asked

CELL = {"task": "t", "length": 64}
EXAMPLES = [Example(f"the cat saw {'green ' * i}bird", "x", str(i), "t") for i in range(5)]


@pytest.fixture
def asked(tokenizer):
    config = DecodeConfig(length=4, block_length=2, temperature=1.0)
    return Asked(tokenizer, config, 128, 2, 7, dict.fromkeys(library.NAMES, "w"))


def score(i, reply):
    return {"scores": {"score": float(len(reply) % 2)}, "references": (str(i),)}


def ask(asked, system, answers, examples=EXAMPLES, **settings):
    return asking.ask(asked, system, CELL, examples, score, answers, **settings)


@pytest.mark.parametrize("which", [0, 2])
def test_answers_are_those_of_reply(asked, systems, tokenizer, which):
    rows = ask(asked, systems[which], Answers(None))
    prompts = [library.prompt_ids(tokenizer, example, 128) for example in EXAMPLES]
    said = library.reply(
        systems[which], tokenizer, prompts, asked.config, seed=7, max_length=128, batch_size=5
    )
    assert [row["reply"] for row in rows] == said.texts
    assert [row["tokens"] for row in rows] == said.lengths.tolist()
    assert rows[3]["prompt"] == tokenizer.decode(prompts[3], skip_special=False)
    assert rows[3] | CELL == rows[3] and rows[3]["system"] == systems[which].name
    assert rows[3]["scores"] == {"score": float(len(said.texts[3]) % 2)}


def test_what_was_answered_is_not_asked_again(asked, systems, tmp_path, monkeypatch):
    path = tmp_path / "out" / "answers.jsonl"
    whole = ask(asked, systems[2], Answers(path))
    lines = path.read_text().splitlines()
    assert [json.loads(line) | {"references": ("0",)} for line in lines[:1]] == whole[:1]
    assert len({json.loads(line)["key"] for line in lines}) == 5
    # As if it had been killed while it wrote the third line.
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][:40])
    told = []
    again = ask(asked, systems[2], Answers(path), report=told.append)
    assert again == whole and told == [2, 2, 1]
    assert path.read_text().splitlines() == lines
    monkeypatch.setattr(library, "batches", None)  # Nothing is left to ask.
    assert ask(asked, systems[2], Answers(path)) == whole


def test_other_settings_are_other_answers(asked, systems, tmp_path):
    path = tmp_path / "answers.jsonl"
    ask(asked, systems[0], Answers(path))
    changes = [
        (dataclasses.replace(asked, weights={"mdlm": "other"}), systems[0]),
        (dataclasses.replace(asked, seed=8), systems[0]),
        (dataclasses.replace(asked, config=dataclasses.replace(asked.config, top_k=3)), systems[0]),
        (asked, systems[1]),
        (asked, systems[0].with_memory(systems[2].memory)),
    ]
    for changed, system in changes:
        told = []
        ask(changed, system, Answers(path), EXAMPLES[:2], report=told.append)
        assert told[0] == 0
    # A changed question alone is asked again, and more questions leave the others.
    told = []
    changed = [*EXAMPLES[:2], Example("a dog", "x", "2", "t"), EXAMPLES[3]]
    ask(asked, systems[0], Answers(path), changed, report=told.append)
    assert told == [3, 1]
    # A batch of another size asks the same.
    told = []
    ask(dataclasses.replace(asked, batch_size=3), systems[0], Answers(path), report=told.append)
    assert told == [5]


def test_replies_that_are_read_back_are_scored_anew(asked, systems, tmp_path):
    path = tmp_path / "answers.jsonl"
    ask(asked, systems[0], Answers(path))

    def other(i, reply):
        return {"scores": {"score": 0.25}, "references": ("new",)}

    rows = asking.ask(asked, systems[0], CELL, EXAMPLES, other, Answers(path))
    assert {row["scores"]["score"] for row in rows} == {0.25} and rows[0]["references"] == ("new",)
    assert len(path.read_text().splitlines()) == 5


def test_wrong_lines_and_prompts_are_named(asked, systems, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"index": 1}\n')
    with pytest.raises(ValueError, match=r"answers\.jsonl:1 is no answer that was written here"):
        Answers(path)
    long = [*EXAMPLES[:1], Example("cat " * 200, "x", "a", "t")]
    with pytest.raises(ValueError, match=r"question 1 of \{'task': 't', 'length': 64\}: .*not fit"):
        ask(asked, systems[0], Answers(None), long)

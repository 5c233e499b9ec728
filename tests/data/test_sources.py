"""Sources: cleaning, groups that never straddle splits, errors that name file and field."""

import itertools
import json
from collections import defaultdict

import pytest

from memdlm_jax.data import needles, sources
from memdlm_jax.data.example import Example
from memdlm_jax.data.needles import NeedleConfig, NeedleTask
from memdlm_jax.data.text import SPLITS, split_sentences, stable_split


@pytest.fixture(scope="module")
def conversations():
    return list(sources.chitchat_turns())


def examples_of(path):
    return [e for split in SPLITS for e in sources.jsonl_examples(path, split)]


def write_lines(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def test_splits_are_by_conversation_and_nothing_is_lost(conversations):
    counts = defaultdict(int)
    for group, _ in conversations:
        counts[sources.split_of(group)] += 1
    assert sum(counts.values()) == len(conversations) == 7168
    assert 0.88 < counts["train"] / 7168 < 0.92
    assert min(counts["validation"], counts["test"]) > 0.04 * 7168
    groups = {s: {e.group for e in sources.chitchat_examples(s)} for s in SPLITS[1:]}
    assert not groups["validation"] & groups["test"]
    assert all(sources.split_of(g) == s for s, found in groups.items() for g in found)


def test_speakers_alternate_and_roles_follow_the_responder(conversations):
    turns = {group: turns for group, turns in conversations}
    for example in list(sources.chitchat_examples("test"))[:500]:
        said = turns[example.group]
        roles = [role for role, _ in example.prompt]
        assert roles[-1] == "user"
        assert all(a != b for a, b in itertools.pairwise(roles))
        assert [text for _, text in said[: len(roles) + 1]] == [
            *(text for _, text in example.prompt),
            example.response,
        ]


@pytest.mark.parametrize(
    ("message", "cleaned"),
    [
        ("  so   tired \n", "so tired"),
        ("noooooooo way!!!!!!", "nooo way!!!"),
        ("a a a a a a", ""),
        ("?", ""),
        ("see https://example.org/a/very/long/path/indeed", ""),
        ("I", ""),
        ("ok", "ok"),
    ],
)
def test_noise_is_left_out(message, cleaned):
    assert sources.clean_message(message) == cleaned


def test_haystack_sentences_are_closed_and_disjoint_in_source():
    sentences = sources.chitchat_sentences("test")
    assert len(sentences) > 5000
    assert not any(s[-1].isalnum() for s in sentences)
    assert all(len(s.split()) >= 4 for s in sentences)


def test_jsonl_prompts_and_conversations(tmp_path):
    path = write_lines(
        tmp_path / "own.jsonl",
        {"prompt": "Q", "response": "A", "group": "g"},
        "",
        {"prompt": "", "response": "plain text"},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "Bye"},
                {"role": "assistant", "content": "Ciao"},
            ]
        },
    )
    found = {e.response: e for e in examples_of(path)}
    assert found["A"] == Example("Q", "A", "g", "own.jsonl")
    assert found["plain text"].messages == ()
    assert found["Hello"].prompt == (("user", "Be brief.\nHi"),)
    assert found["Ciao"].prompt[1:] == (("assistant", "Hello"), ("user", "Bye"))
    assert found["Ciao"].group == found["Hello"].group


def test_the_default_group_is_the_first_message_wherever_it_stands(tmp_path):
    lines = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(40)]
    talk = {"role": "user", "content": "question 7"}, {"role": "assistant", "content": "other"}
    groups = [
        [e.group for e in sources.jsonl_examples(write_lines(tmp_path / name, *found), None)]
        for name, found in (
            ("a.jsonl", lines),
            ("b.jsonl", lines),
            ("c.jsonl", [{"messages": talk}]),
        )
    ]
    assert groups[0] == groups[1] and len(set(groups[0])) == 40
    assert groups[2] == [groups[0][7]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"own\.jsonl:2: not valid JSON"),
        ("[1]", r":2: a line must be a JSON object, not list"),
        ({"prompt": "Q"}, r":2: field 'response' is missing"),
        ({"prompt": "Q", "response": ""}, r":2: field 'response' is ''"),
        ({"prompt": 3, "response": "A"}, r":2: field 'prompt' is 3"),
        ({"messages": "hi"}, r":2: field 'messages' must be a list"),
        ({"messages": [{"role": "user"}]}, r":2: messages\[0\]: field 'content' is missing"),
        ({"messages": [{"role": "bot", "content": "x"}]}, r":2: messages\[0\]: field 'role' is"),
        ({"messages": [{"role": "user", "content": "x"}]}, r":2: .* no assistant message"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "own.jsonl", {"prompt": "Q", "response": "A"}, line)
    with pytest.raises(ValueError, match=message):
        examples_of(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no JSON-lines file"):
        examples_of(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no \.txt, .* file in the folder"):
        list(sources.text_sections(tmp_path))


def test_text_is_packed_whole_and_once(tmp_path, tokenizer, sentences):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text(" ".join(sentences * 40))
    packed = {s: list(sources.text_examples(tmp_path, s, tokenizer, 60)) for s in SPLITS}
    everything = [e for found in packed.values() for e in found]
    total = sum(len(split_sentences(e.response)) for e in everything)
    assert total == len(split_sentences(" ".join(sentences * 40)))
    assert all(e.messages == () and e.group.startswith("deep/a.txt#") for e in everything)
    assert max(len(tokenizer.encode(" " + e.response)) for e in everything) <= 60
    groups = [{e.group for e in found} for found in packed.values()]
    assert not groups[0] & (groups[1] | groups[2]) and not groups[1] & groups[2]


def test_continuation_splits_a_row_in_two(tmp_path, tokenizer, sentences):
    (tmp_path / "a.md").write_text(" ".join(sentences * 40))
    plain = list(sources.text_examples(tmp_path, "train", tokenizer, 90))
    halves = list(sources.text_examples(tmp_path, "train", tokenizer, 90, continuation=True))
    joined = ["".join(text for _, text in e.messages) + e.response for e in halves]
    assert joined == [e.response for e in plain]
    assert any(e.messages for e in halves)


def test_sentences_end_where_prose_ends_them():
    text = 'He said "Stop."  Then Mrs. Smith\n(of U. S. birth) left! "Why?" I asked... Pi is 3.5 m.'
    assert split_sentences(text) == [
        'He said "Stop."',
        "Then Mrs. Smith (of U. S. birth) left!",
        '"Why?"',
        "I asked...",
        "Pi is 3.5 m.",
    ]


def test_stable_split_has_the_shares_asked_for():
    found = [stable_split(f"name {i}", 0.5, 0.25) for i in range(2000)]
    assert 0.46 < found.count("train") / 2000 < 0.54
    assert 0.22 < found.count("validation") / 2000 < 0.28


def test_needles_as_examples(tokenizer, sentences):
    task = NeedleTask(NeedleConfig(length=256), tokenizer, sentences)
    first, second = sources.needle_examples(task, 9, 2)
    episode = task.episode(9, 1)
    assert second.prompt + second.prefix == episode.prompt
    assert second.response == episode.response
    assert first.group != second.group


def test_bad_examples_are_named():
    with pytest.raises(ValueError, match="response of an example of group 'g' is empty"):
        Example("Q", "", "g", "s")
    with pytest.raises(ValueError, match="role='bot' must be one of user, assistant, text"):
        Example((("bot", "Q"),), "A", "g", "s")


def test_a_missing_package_names_the_extra(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(sources.importlib.resources, "files", missing)
    with pytest.raises(ImportError, match=r"pip install memdlm_jax\[corpus\]"):
        sources._chitchat_json()
    with pytest.raises(ImportError, match=r"pip install memdlm_jax\[corpus\]"):
        needles._word_list("nounlist.txt")

"""RULER's questions from published files: SQuAD 2.0 and HotpotQA, in files of a few questions."""

import json
import re

import pytest

from memdlm_jax.evaluation.ruler import RulerConfig, RulerTask, read_hotpot, read_squad


def paragraph(topic, number):
    return {
        "context": f"The {topic} number {number} stands in hall {topic}{number}. It is old.",
        "qas": [
            {
                "question": f"Where stands the {topic} number {number}?",
                "id": f"{topic}-{number}",
                "answers": [
                    {"text": f"hall {topic}{number}", "answer_start": 0},
                    {"text": f"{topic}{number}", "answer_start": 0},
                    {"text": f"hall {topic}{number}", "answer_start": 0},
                ],
                "is_impossible": False,
            },
            {"question": "Who built it?", "id": "x", "answers": [], "is_impossible": True},
        ],
    }


TOPICS = [f"{first}{second}" for first in ("blue", "red", "tall") for second in ("bird", "lamp")]
SQUAD = {
    "version": "v2.0",
    "data": [
        {"title": topic, "paragraphs": [paragraph(topic, number) for number in range(5)]}
        for topic in TOPICS
    ],
}


def hotpot(number):
    titles = [f"Person {number}", f"Town {number}", *(f"Other {number} {i}" for i in range(8))]
    texts = [
        [f"Person {number} was born in Town {number}.", " She wrote."],
        [f"Town {number} lies on the river R{number}.", " It is small."],
        *([f"Other {number} {i} is something else.", " It is known."] for i in range(8)),
    ]
    return {
        "_id": str(number),
        "question": f"On which river was Person {number} born?",
        "answer": f"R{number}",
        "supporting_facts": [[titles[0], 0], [titles[1], 0], [titles[1], 1]],
        "context": [list(pair) for pair in zip(titles, texts, strict=True)],
        "type": "bridge",
        "level": "hard",
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    for name, data in {"squad": SQUAD, "hotpot": [hotpot(n) for n in range(6)]}.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


def documents_of(sample):
    body = sample.prompt.split("given documents.\n\n")[1].split("\n\nAnswer the question")[0]
    parts = re.split(r"(?:^|\n\n)Document \d+:\n", body)
    assert parts[0] == ""
    return parts[1:]


def test_squad_is_read(files):
    found = read_squad(files / "squad.json")
    assert len(found.questions) == len(found.documents) == found.unanswerable == 30
    first = found.questions[0]
    assert first.text == "Where stands the bluebird number 0?"
    assert first.references == ("hall bluebird0", "bluebird0")
    assert first.gold == ("The bluebird number 0 stands in hall bluebird0. It is old.",)
    assert len(first.related) == 4 and all("bluebird" in text for text in first.related)


def test_squad_prompts_have_the_paragraph_then_those_of_its_article(files):
    config = RulerConfig("ruler_qa_squad", 200)
    ruler = RulerTask(config, str.split, documents=files / "squad.json")
    assert ruler.size == 30 and ruler.left_out == 0 and ruler.is_standard
    samples = [ruler.sample(index) for index in range(30)]
    assert len({sample.references for sample in samples}) == 30
    for sample in samples:
        assert 190 <= sample.length <= 200 and sample.is_standard
        question = re.findall(r"Question: Where stands the (\w+) number (\d)\? ", sample.prompt)
        topic, number = question[0]
        assert sample.references == (f"hall {topic}{number}", f"{topic}{number}")
        found = documents_of(sample)
        gold = [text for text in found if f"hall {topic}{number}." in text]
        assert len(gold) == 1 and gold[0].endswith("It is old.")
        same = [text for text in found if text.startswith(f"The {topic} ")]
        assert len(same) == 5 and len(found) > 5
        assert ruler.score(sample, f"It is {topic}{number}.") == 1.0
        before = sum(len(text.split()) + 2 for text in found[: found.index(gold[0])])
        total = sum(len(text.split()) + 2 for text in found)
        assert sample.depths == pytest.approx((before / total,), abs=0.01)
    places = {documents_of(s).index(next(d for d in documents_of(s) if s.references[0] + "." in d))
              for s in samples}  # fmt: skip
    assert len(places) > 3


def test_hotpot_prompts_have_both_gold_documents(files):
    found = read_hotpot(files / "hotpot.json")
    assert len(found.questions) == 6 and len(found.documents) == 60
    assert found.questions[0].gold == (
        "Person 0\nPerson 0 was born in Town 0. She wrote.",
        "Town 0\nTown 0 lies on the river R0. It is small.",
    )
    for length, own in ((150, range(3, 6)), (300, [10])):
        config = RulerConfig("ruler_qa_hotpot", length)
        ruler = RulerTask(config, str.split, documents=found)
        for index in range(6):
            sample = ruler.sample(index)
            assert 0.95 * length <= sample.length <= length
            texts = documents_of(sample)
            number = sample.references[0].removeprefix("R")
            assert (
                f"Town {number}\nTown {number} lies on the river R{number}. It is small." in texts
            )
            assert (
                f"Person {number}\nPerson {number} was born in Town {number}. She wrote." in texts
            )
            assert len([t for t in texts if re.match(rf"\w+ {number}\b", t)]) in own
            assert len(sample.depths) == 2


def test_order_hangs_on_seed_and_not_on_where_the_file_is(files, tmp_path):
    (tmp_path / "other.json").write_text((files / "squad.json").read_text())
    first, same, other = (
        [RulerTask(RulerConfig("ruler_qa_squad", 200, seed), str.split, documents=path).sample(i)
         for i in range(6)]
        for seed, path in ((0, files / "squad.json"), (0, tmp_path / "other.json"),
                           (1, files / "squad.json"))
    )  # fmt: skip
    assert first == same
    assert [s.references for s in first] != [s.references for s in other]


def test_questions_that_do_not_fit_are_counted(files, tmp_path):
    data = json.loads((files / "squad.json").read_text())
    data["data"][0]["paragraphs"][0]["context"] += " And on." * 200
    (tmp_path / "long.json").write_text(json.dumps(data))
    config = RulerConfig("ruler_qa_squad", 200)
    ruler = RulerTask(config, str.split, documents=tmp_path / "long.json")
    assert (ruler.size, ruler.left_out) == (29, 1)
    asked = [ruler.sample(index).references[0] for index in range(29)]
    assert "hall bluebird0" not in asked
    with pytest.raises(ValueError, match=r"index=29 must be below 29: .* 1 do not"):
        ruler.sample(29)


def test_documents_may_hold_braces(tmp_path):
    data = json.loads(json.dumps(SQUAD))
    data["data"][0]["paragraphs"][0]["context"] = "A {query} about {context}, and {0}."
    (tmp_path / "braces.json").write_text(json.dumps(data))
    config = RulerConfig("ruler_qa_squad", 480)  # All documents fit.
    sample = RulerTask(config, str.split, documents=tmp_path / "braces.json").sample(0)
    assert "A {query} about {context}, and {0}." in documents_of(sample)
    assert sample.prompt.count("Question: ") == 1


def test_too_short_and_too_long_are_named(files):
    path = files / "squad.json"
    config = RulerConfig("ruler_qa_squad", 60)
    with pytest.raises(ValueError, match=r"length=60 must be at least \d+ for ruler_qa_squad"):
        RulerTask(config, str.split, documents=path)
    least = RulerTask(RulerConfig("ruler_qa_squad", 200), str.split, documents=path).least_length
    assert RulerTask(RulerConfig("ruler_qa_squad", least), str.split, documents=path).size > 0
    ruler = RulerTask(RulerConfig("ruler_qa_squad", 5000), str.split, documents=path)
    with pytest.raises(ValueError, match=r"can fill \d+ of length=5000 .*: give more documents"):
        ruler.sample(0)


@pytest.mark.parametrize(
    ("read", "data", "message"),
    [
        (read_squad, [], "is no file of SQuAD 2.0"),
        (read_squad, {"data": [{"paragraphs": [{"context": "x"}]}]}, "KeyError.*qas"),
        (read_squad, {"data": []}, "has no question with an answer"),
        (read_hotpot, {"data": []}, "is no file of HotpotQA"),
        (read_hotpot, [hotpot(0) | {"answer": ""}], "must be non-empty strings"),
        (read_hotpot, [hotpot(0) | {"supporting_facts": []}], "must be non-empty strings"),
        (read_hotpot, [hotpot(0) | {"supporting_facts": [["Nowhere", 0]]}], "KeyError.*Nowhere"),
    ],
)
def test_other_files_are_refused(read, data, message, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "data.json")


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no questions at"):
        read_squad(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is no file of HotpotQA"):
        read_hotpot(tmp_path / "broken.json")

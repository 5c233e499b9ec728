import collections
import dataclasses
import itertools
import json

import pytest

from memdlm_jax.evaluation import tasks
from memdlm_jax.evaluation.babi import TASKS as STORIES
from memdlm_jax.evaluation.ruler import TASKS, RulerConfig, RulerTask, oracle
from memdlm_jax.evaluation.systems import prompt_ids
from memdlm_jax.evaluation.tasks import BABILONG, TaskSuite, Variant
from tests.evaluation.babi_solver import solve

SMALL = Variant(
    max_new_tokens=64, value_digits=3, num_hops=1, num_common=2, with_example=False, num_values=2,
    template="short",
)  # fmt: skip


def made(tokenizer, sentences, *names, **settings):
    suite = {"lengths": (600,), "samples": 4, "variant": Variant()} | settings
    return list(tasks.cells(TaskSuite(names, **suite), tokenizer, sentences))


@pytest.mark.parametrize("name", tasks.NAMES)
def test_a_cell_fits_its_canvas_and_the_right_answer_scores_one(name, tokenizer, sentences):
    kept = {k: v for k, v in dataclasses.asdict(SMALL).items() if k in SMALL.of(name)}
    (cell,) = made(tokenizer, sentences, name, lengths=(1200,), samples=3, variant=Variant(**kept))
    assert len(cell.questions) == 3 and not cell.is_standard and cell.answer_tokens == 64
    for question in cell.questions:
        ids = prompt_ids(tokenizer, question.example, 5000)
        assert 0.9 * 1200 <= len(ids) + cell.answer_tokens <= 1200
        right = cell.score(question.index, " ".join(question.references))
        assert list(right) == list(cell.score_names) and set(right.values()) == {1.0}
        assert set(cell.score(question.index, "").values()) == {0.0}
        if name not in BABILONG:
            prompt = question.example.prompt + question.example.prefix
            if not name.startswith("ruler_qa"):
                said = oracle(name, prompt)
                assert cell.score(question.index, said)["score"] == 1.0
    assert all(0 < floor <= 1 for floor in cell.floors.values())
    assert (not cell.floors) == name.startswith("ruler_qa")


@pytest.mark.parametrize("story", STORIES)
def test_stories_are_those_that_a_solver_answers(story, tokenizer, sentences):
    (cell,) = made(tokenizer, sentences, f"babilong_{story}", lengths=(0,), samples=8)
    assert cell.is_standard and cell.answer_tokens == 16
    for question in cell.questions:
        assert (solve(question.example.prompt),) == question.references
    most = collections.Counter(q.references[0] for q in cell.questions).most_common(1)[0][1]
    assert cell.floors == {"contains": most / 8, "strict": most / 8}


@pytest.mark.parametrize(
    ("name", "floor"),
    [
        ("niah_single_1", 1), ("niah_multikey_1", 1 / 4), ("niah_multivalue", 1), ("ruler_vt", 1),
    ],
)  # fmt: skip
def test_floors_are_counted_by_hand(name, floor, tokenizer, sentences):
    (cell,) = made(tokenizer, sentences, name, lengths=(1500,))
    assert cell.is_standard and cell.floors == {"score": floor}


def test_floor_of_counted_words(tokenizer, sentences):
    for name in ("ruler_cwe", "ruler_fwe"):
        settings = {"max_new_tokens": 120}
        (cell,) = made(
            tokenizer, sentences, name, lengths=(4000,), variant=Variant(**settings), samples=2
        )
        sampled = RulerTask(
            RulerConfig(
                name, length=4000, reserved_tokens=tokenizer.turn_tokens, max_new_tokens=120
            ),
            tokenizer,
        )
        shares = []
        for i in range(2):
            text = sampled.sample(i).prompt
            if name == "ruler_cwe":
                listed = text.split("\n1. ")[-1].split("\n")[0].split(". ")
                listed[-1] += " 0"
                words = {word.rsplit(" ", 1)[0].lower() for word in listed}
            else:
                words = {w for w in text.split("words. ")[1].split("\n")[0].split() if w != "..."}
            shares.append(len(sampled.sample(i).references) / len(words))
        assert cell.floors["score"] == pytest.approx(sum(shares) / 2)


def test_cells_are_a_pure_function_and_ask_different_questions(tokenizer, sentences):
    names = ("niah_multikey_1", "babilong_qa1")
    settings = {"lengths": (800, 900, 0), "seeds": (0, 1)}
    once, again = (made(tokenizer, sentences, *names, **settings) for _ in range(2))
    assert [c.questions for c in once] == [c.questions for c in again]
    # BABILong tells one story at every length; nothing else comes twice.
    same = [{q.same for q in cell.questions} for cell in once]
    for (a, cell), (b, other) in itertools.combinations(enumerate(once), 2):
        shared = cell.task == other.task == "babilong_qa1" and cell.seed == other.seed
        assert bool(same[a] & same[b]) == shared
    alone = made(tokenizer, sentences, *names, **(settings | {"lengths": (900,), "samples": 5}))
    assert alone[2].questions[:4] == once[8].questions, "questions hang on nothing else"
    shape = [(cell.task, cell.length, cell.seed) for cell in once]
    assert shape == list(itertools.product(names, (800, 900, 0), (0, 1)))
    for name in names:
        asked = [
            (q.example.prompt.splitlines()[-1], q.references)
            for cell in once
            if cell.task == name
            for q in cell.questions
        ]
        # Stories are few: what may repeat is the last line with its answer, never a whole set.
        assert len(set(asked)) > (20 if name.startswith("niah") else 8)
    # Without filler there is little beside the question.
    bare = next(c for c in once if c.task == names[0] and c.length == 0)
    assert len(bare.questions[0].example.prompt) < 0.6 * len(once[0].questions[0].example.prompt)


def test_depths_are_taken_in_turn(tokenizer, sentences):
    (cell,) = made(
        tokenizer, sentences, "niah_single_2", lengths=(900,), samples=6, depths=(0.0, 50.0, 100.0)
    )
    for question, wanted in zip(cell.questions, (0, 0.5, 1) * 2, strict=True):
        assert question.depth == pytest.approx(wanted, abs=0.06)
    assert cell.is_standard and not cell.changes
    both = ("niah_single_2", "ruler_qa_squad")
    _, local = made(tokenizer, sentences, *both, depths=(5.0,), lengths=(900,))
    assert not local.is_standard
    assert all(
        q.depth is None
        for q in made(tokenizer, sentences, "babilong_qa1", lengths=(0,))[0].questions
    )


def test_originals_are_read(tmp_path, tokenizer, sentences):
    rows = [
        {
            "input": f"Mary moved to the office. {i}.",
            "question": "Where is Mary?",
            "target": "office",
        }
        for i in range(5)
    ]
    (tmp_path / "data/qa1").mkdir(parents=True)
    (tmp_path / "data/qa1/1k.json").write_text(json.dumps(rows))
    settings = {"lengths": (1024,), "babilong": str(tmp_path)}
    (cell,) = made(tokenizer, sentences, "babilong_qa1", **settings)
    assert cell.is_standard and cell.score(0, "the office") == {"contains": 1.0, "strict": 1.0}
    with pytest.raises(ValueError, match="samples=9 must be at most 5"):
        made(tokenizer, sentences, "babilong_qa1", samples=9, **settings)
    with pytest.raises(ValueError, match=r"has 1000: with tasks\.babilong it must be 0 or a mult"):
        made(tokenizer, sentences, "babilong_qa1", **(settings | {"lengths": (1000,)}))
    with pytest.raises(FileNotFoundError, match="squad"):
        made(tokenizer, sentences, "ruler_qa_squad", squad=str(tmp_path / "squad.json"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ()}, r"tasks\.names is empty"),
        ({"names": ("niah",)}, "tasks.names='niah' must be one of"),
        ({"names": ("ruler_vt", "ruler_vt")}, "must not repeat a value"),
        ({"lengths": (-1,)}, r"tasks\.lengths=-1 must be an integer of at least 0"),
        ({"samples": 1}, r"tasks\.samples=1 must be an integer of at least 2"),
        ({"depths": (3.0,), "names": ("ruler_vt",)}, "must be empty: no task has needles"),
        ({"babilong": "x", "names": ("ruler_vt",)}, "tasks.babilong='x' must be empty"),
    ],
)
def test_what_cannot_be_asked_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TaskSuite(**settings)


def test_what_does_not_fit_is_refused(tokenizer, sentences):
    with pytest.raises(ValueError, match="length=100 must be at least"):
        made(tokenizer, sentences, "niah_single_1", lengths=(100,))
    with pytest.raises(
        ValueError, match=r"max_new_tokens=2 must be at least \d+ for niah_single_3"
    ):
        made(tokenizer, sentences, "niah_single_3", variant=Variant(max_new_tokens=2))
    assert set(TASKS) < set(tasks.NAMES)

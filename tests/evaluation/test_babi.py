"""bAbI stories that their text alone answers, and the harness's prompts to the character."""

import re
from collections import Counter

import numpy as np
import pytest

from memdlm_jax.evaluation.babi import LABELS, TASKS, draw_story, format_prompt
from tests.evaluation import babi_solver
from tests.evaluation.babi_solver import solve

# By hand after lm_eval/tasks/babilong/babilong_qa{1..5}.yaml, each with a story of our own.
PROMPTS = {
    "qa1": (
        "I will give you context with the facts about positions of different persons hidden "
        "in some random text and a question. You need to answer the question based only on "
        "the information from the facts. If a person was in different locations, use the "
        "latest location to answer the question.\n"
        "Always return your answer in the following format:\n"
        "The most recent location of 'person' is 'location'. Do not write anything else "
        "after that.\n\n"
        "Charlie went to the hallway. Judith come back to the kitchen. Charlie travelled to "
        "balcony.\n"
        "Where is Charlie? The most recent location of Charlie is balcony.\n\n"
        "Alan moved to the garage. Charlie went to the beach. Alan went to the shop. Rouse "
        "travelled to balcony.\n"
        "Where is Alan? The most recent location of Alan is shop.\n\n"
        "Mary went to the office. John moved to the garden.\n"
        "Where is Mary?"
    ),
    "qa2": (
        "I will give you context with the facts about locations and actions of different "
        "persons hidden in some random text and a question. You need to answer the question "
        "based only on the information from the facts. If a person got an item in the first "
        "location and travelled to the second location the item is also in the second "
        "location. If a person dropped an item in the first location and moved to the second "
        "location the item remains in the first location.\n"
        "Always return your answer in the following format:\n"
        "The 'item' is in 'location'. Do not write anything else after that.\n\n"
        "Charlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony.\n"
        "Where is the bottle? The bottle is in the balcony.\n\n"
        "Alan moved to the garage. Alan got a screw driver. Alan moved to the kitchen.\n"
        "Where is the screw driver? The screw driver is in the kitchen.\n\n"
        "Mary got the milk there. Mary went back to the hallway.\n"
        "Where is the milk?"
    ),
    "qa3": (
        "I give you context with the facts about locations and actions of different persons "
        "hidden in some random text and a question. You need to answer the question based "
        "only on the information from the facts. If a person got an item in the first "
        "location and travelled to the second location the item is also in the second "
        "location. If a person dropped an item in the first location and moved to the second "
        "location the item remains in the first location.\n"
        "Always return your answer in the following format:\n"
        "Before the $location_1$ the $item$ was in the $location_2$. Do not write anything "
        "else after that.\n\n"
        "John journeyed to the bedroom. Mary grabbed the apple. Mary went back to the "
        "bathroom. Daniel journeyed to the bedroom. Daniel moved to the garden. Mary "
        "travelled to the kitchen.\n"
        "Where was the apple before the kitchen? Before the kitchen the apple was in the "
        "bathroom.\n\n"
        "John went back to the bedroom. John went back to the garden. John went back to the "
        "kitchen. Sandra took the football. Sandra travelled to the garden. Sandra journeyed "
        "to the bedroom.\n"
        "Where was the football before the bedroom? Before the bedroom the football was in "
        "the garden.\n\n"
        "Mary took the milk. Mary moved to the office. Mary went to the garden.\n"
        "Where was the milk before the garden?"
    ),
    "qa4": (
        "I will give you context with the facts about different people, their location and "
        "actions, hidden in some random text and a question. You need to answer the question "
        "based only on the information from the facts.\n"
        "Your answer should contain only one word - location. Do not write anything else "
        "after that.\n\n"
        "The hallway is south of the kitchen. The bedroom is north of the kitchen.\n"
        "What is the kitchen south of? bedroom\n\n"
        "The garden is west of the bedroom. The bedroom is west of the kitchen.\n"
        "What is west of the bedroom? garden\n\n"
        "The office is north of the garden. The garden is north of the kitchen.\n"
        "What is the garden north of?"
    ),
    "qa5": (
        "I will give you context with the facts about locations and their relations hidden "
        "in some random text and a question. You need to answer the question based only on "
        "the information from the facts.\n"
        "Your answer should contain only one word. Do not write anything else after that. Do "
        "not explain your answer.\n\n"
        "Mary picked up the apple there. Mary gave the apple to Fred. Mary moved to the "
        "bedroom. Bill took the milk there.\n"
        "Who did Mary give the apple to? Fred\n\n"
        "Jeff took the football there. Jeff passed the football to Fred. Jeff got the milk "
        "there. Bill travelled to the bedroom.\n"
        "Who gave the football? Jeff\n\n"
        "Bill got the milk. Bill handed the milk to Jeff.\n"
        "Who received the milk?"
    ),
}

STORIES = {
    "qa1": ("Mary went to the office. John moved to the garden.", "Where is Mary?", "office"),
    "qa2": (
        "Mary got the milk there. Mary went back to the hallway.", "Where is the milk?", "hallway",
    ),
    "qa3": (
        "Mary took the milk. Mary moved to the office. Mary went to the garden.",
        "Where was the milk before the garden?", "office",
    ),
    "qa4": (
        "The office is north of the garden. The garden is north of the kitchen.",
        "What is the garden north of?", "kitchen",
    ),
    "qa5": ("Bill got the milk. Bill handed the milk to Jeff.", "Who received the milk?", "Jeff"),
}  # fmt: skip


# The solver, against what the publication says.


@pytest.mark.parametrize(
    ("context", "question", "answer"),
    [
        *STORIES.values(),
        # Solved examples of the harness.
        (
            "John journeyed to the bedroom. Mary grabbed the apple. Mary went back to the "
            "bathroom. Daniel journeyed to the bedroom. Daniel moved to the garden. Mary "
            "travelled to the kitchen.",
            "Where was the apple before the kitchen?", "bathroom",
        ),
        (
            "The hallway is south of the kitchen. The bedroom is north of the kitchen.",
            "What is the kitchen south of?", "bedroom",
        ),
        (
            "The garden is west of the bedroom. The bedroom is west of the kitchen.",
            "What is west of the bedroom?", "garden",
        ),
        (
            "Jeff took the football there. Jeff passed the football to Fred. Jeff got the milk "
            "there. Bill travelled to the bedroom.",
            "Who gave the football?", "Jeff",
        ),
        (
            "Fred picked up the apple there. Fred handed the apple to Bill. Bill journeyed to the "
            "bedroom. Jeff went back to the garden.",
            "What did Fred give to Bill?", "apple",
        ),
        # What was dropped stays; of two arrivals the last counts; who goes on empty-handed.
        (
            "John went to the office. John got the milk. John moved to the garden. John left the "
            "milk there. John went to the kitchen.",
            "Where is the milk?", "garden",
        ),
        (
            "John went to the office. John got the milk. John moved to the garden. John went to "
            "the kitchen. John moved to the garden. John went to the hallway. John put down the "
            "milk. John went to the garden.",
            "Where was the milk before the garden?", "kitchen",
        ),
    ],
)  # fmt: skip
def test_solver_knows_the_rules(context, question, answer):
    assert solve(f"\n\n{context}\n{question}") == answer


# The stories.


@pytest.mark.parametrize(("task", "short"), [*((task, False) for task in TASKS), ("qa3", True)])
def test_text_alone_answers_every_story(task, short):
    rng = np.random.default_rng(11)
    for _ in range(2000):
        story = draw_story(task, rng, short)
        context = " ".join(story.facts)
        assert solve(format_prompt(task, context, story.question)) == story.answer, story
        assert tuple(babi_solver.facts_of(context)) == story.facts
        assert story.answer in LABELS[task]


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_balanced_and_never_asked_for(task):
    rng = np.random.default_rng(2)
    stories = [draw_story(task, rng) for _ in range(1000)]
    counts = Counter(story.answer for story in stories)
    assert set(counts) == set(LABELS[task])
    assert max(counts.values()) < (0.25 if task == "qa5" else 0.21) * len(stories)
    assert not any(re.search(rf"\b{story.answer}\b", story.question) for story in stories)


def test_every_wording_occurs():
    rng = np.random.default_rng(3)
    stories = [draw_story(task, rng) for task in TASKS for _ in range(200)]
    facts = " ".join(fact for story in stories for fact in story.facts)
    verbs = (
        "went to|journeyed to|travelled to|moved to|went back to|grabbed|took|got|picked up|"
        "dropped|put down|discarded|left|gave|handed|passed"
    )
    for verb in verbs.split("|"):
        assert re.search(rf"[A-Z][a-z]+ {verb} the [a-z]+", facts), verb
    assert all(f"is {side} of" in facts for side in ("north", "south", "east", "west"))
    endings = Counter(re.findall(r"(?:got|took|left|dropped) the \w+( there)?\.", facts))
    assert 0.2 < endings[" there"] / endings.total() < 0.4
    questions = [story.question for story in stories]
    for form in babi_solver.FORMS:
        assert any(re.fullmatch(form, question) for question in questions), form
    for side in ("north", "south", "east", "west"):
        assert any(re.fullmatch(rf"What is {side} of the \w+\?", q) for q in questions)
        assert any(re.fullmatch(rf"What is the \w+ {side} of\?", q) for q in questions)


def test_samples_are_as_long_as_the_published_ones():
    # Mean characters at 0k: bytes and rows of babilong-1k-samples, less 4 for each of 3 strings.
    published = {
        "qa1": 214_511 / 1000, "qa2": 497_258 / 999, "qa3": 1_515_195 / 999,
        "qa4": 118_279 / 999, "qa5": 617_597 / 999,
    }  # fmt: skip
    for task, size in published.items():
        rng = np.random.default_rng(7)
        stories = [draw_story(task, rng) for _ in range(1500)]
        # Their questions end with a space.
        ours = [len(" ".join([*s.facts, s.question, s.answer])) for s in stories]
        assert np.mean(ours) == pytest.approx(size - 12, rel=0.06), task


def test_short_stories_are_half_as_long():
    rng = np.random.default_rng(0)
    long, short = (
        [len(draw_story("qa3", rng, short).facts) for _ in range(300)] for short in (False, True)
    )
    assert min(long) == 28 and min(short) < 10
    assert 0.4 < np.mean(short) / np.mean(long) < 0.5


def test_bad_arguments_are_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="task='qa9' must be one of qa1"):
        draw_story("qa9", rng)
    with pytest.raises(ValueError, match="short=True is for qa3 alone"):
        draw_story("qa1", rng, short=True)


# The prompt.


@pytest.mark.parametrize("task", TASKS)
def test_prompt_is_the_harness_s(task):
    context, question, _ = STORIES[task]
    assert format_prompt(task, f" {context}\n", f"{question} ") == PROMPTS[task]
    assert format_prompt(task, context, question, "short") == f"{context}\n{question}"

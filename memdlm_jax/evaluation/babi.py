"""Stories and questions in the manner of bAbI tasks 1 .. 5 (Weston et al., arXiv 1502.05698).

A world of people, objects and six places is simulated, every event is told in one sentence, and
questions are asked whose answer follows from the sentences alone. The wording is that of the
published files (version 1.2); the stories are our own.

Where this differs from the published files: people and objects start at random places (in theirs
always at the same ones, which makes some answers likelier), and what the publication leaves open,
how often which event and question come, is set so that samples are as long on average as those of
BABILong without filler (see ``draw_story``).
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, TypeVar, get_args

import numpy as np

from memdlm_jax.data.text import check_choice

Task = Literal["qa1", "qa2", "qa3", "qa4", "qa5"]
TASKS: tuple[Task, ...] = get_args(Task)

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
PEOPLE = ("Daniel", "John", "Mary", "Sandra")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")

LABELS: dict[Task, tuple[str, ...]] = {task: PLACES for task in TASKS[:4]} | {
    "qa5": GIVERS + OBJECTS
}
"""Every answer that a task can have."""

QUESTIONS = 5
"""Questions of one published story (qa4 has one); each is a sample with all sentences before it."""

Template = Literal["public", "short"]

_Action = Literal["move", "get", "drop", "give"]
_VERBS: dict[_Action, tuple[str, ...]] = {
    "move": ("went to", "journeyed to", "travelled to", "moved to", "went back to"),
    "get": ("grabbed", "took", "got", "picked up"),
    "drop": ("dropped", "put down", "discarded", "left"),
    "give": ("gave", "handed", "passed"),
}
_THERE = 0.3  # Share of "got the milk there." where it may stand; 7 of 24 counted in version 1.2.
_SIDES = (("north", "south"), ("east", "west"))

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Story:
    """Sentences and one question about them.

    Attributes:
        facts: sentences, in the order of the events.
        question: ends with a question mark.
        answer: one of ``LABELS`` of the task.
    """

    facts: tuple[str, ...]
    question: str
    answer: str


@dataclasses.dataclass(frozen=True)
class _Rules:
    """How stories of a task come about.

    Attributes:
        people: who acts.
        actions: drawn uniformly, so that one that stands here twice is twice as likely.
        first: least number of sentences before the first question.
        gap: least number of sentences between questions.
        chance: of a question after each sentence from there on.
    """

    people: tuple[str, ...]
    actions: tuple[_Action, ...]
    first: int
    gap: int
    chance: float


def _pick(rng: np.random.Generator, choices: Sequence[_T]) -> _T:
    return choices[int(rng.integers(len(choices)))]


_RULES: dict[Task, _Rules] = {
    "qa1": _Rules(PEOPLE, ("move",), first=2, gap=2, chance=1.0),
    "qa2": _Rules(PEOPLE, ("move", "get", "drop"), first=3, gap=3, chance=1 / 2),
    "qa3": _Rules(PEOPLE, ("move", "get", "drop"), first=28, gap=2, chance=1 / 7),
    "qa5": _Rules(GIVERS, ("move", "get", "give") * 7 + ("drop",), first=2, gap=2, chance=1.0),
}


def draw_story(task: Task, rng: np.random.Generator, short: bool = False) -> Story:
    """A story with one of its questions.

    Tasks, after the published files and their generator (facebookarchive/bAbI-tasks):

    - qa1: two moves and a question, five times. "Where is Mary?": where she went last.
    - qa2: moves, getting, dropping; from three sentences on a question with chance 1/2. "Where is
      the milk?": where its holder is, or where it was dropped.
    - qa3: events as in qa2; from 28 sentences on a question with chance 1/7. "Where was the milk
      before the kitchen?": the place from which it came to the kitchen, the last time it did.
    - qa4: three places on a line, two sentences in either wording and order. "What is north of the
      office?", "What is the office north of?": the office is the place in the middle.
    - qa5: moves, getting, giving, seldom dropping; a question after every two sentences once
      something was given. "What did Bill give to Fred?", "Who gave the milk?", "Who gave the milk
      to Fred?", "Who received the milk?", "Who did Bill give the milk to?", about the last gift.

    A published story asks five questions, each a sample of its own with all sentences before it;
    here one of the five is drawn. Means of the published samples (RMT-team/babilong-1k-samples at
    0k, from the sizes in its description) and of ours, in characters of sentences, question and
    answer: qa1 203 and 202, qa2 486 and 493, qa3 1505 and 1519, qa4 106 and 108, qa5 606 and 604.

    Args:
        task: which one.
        rng: is advanced.
        short: ask about qa3's events as early and as often as about qa2's, after 3 sentences. Such
            stories have half as many sentences, 24 instead of 51 on average, and are a variant.

    Raises:
        ValueError: no such task, or ``short`` for another task than qa3.
    """
    check_choice("task", task, TASKS)
    check_short("short", short, task)
    if task == "qa4":
        return _relations(rng)
    return _events(task, _RULES["qa2" if short else task], rng)


def _events(task: Task, rules: _Rules, rng: np.random.Generator) -> Story:
    """Run a world until the drawn question comes up."""
    world, ask = _World(rules, rng), _ASK[task]
    skipped, since = int(rng.integers(QUESTIONS)), 0
    while True:
        world.step()
        since += 1
        early = len(world.facts) < rules.first or since < rules.gap
        if early or rng.random() >= rules.chance:
            continue
        if (asked := ask(world, rng)) is None:
            continue
        if skipped == 0:
            return Story(tuple(world.facts), *asked)
        skipped, since = skipped - 1, 0


class _World:
    """Who and what is where, and what of it the sentences tell.

    Attributes:
        facts: the sentences so far.
        place: place of every person and object; an object that is held is where its holder is.
        holder: person who holds an object; objects that lie somewhere are not in it.
        told: people and objects whose place follows from the sentences.
        journey: the places of each object in order, as far as told, repeats collapsed.
        gift: giver, object and receiver of the last gift.
    """

    def __init__(self, rules: _Rules, rng: np.random.Generator):
        self._rules, self._rng = rules, rng
        self.facts: list[str] = []
        self.place = {name: _pick(rng, PLACES) for name in (*rules.people, *OBJECTS)}
        self.holder: dict[str, str] = {}
        self.told: set[str] = set()
        self.journey: dict[str, list[str]] = {name: [] for name in OBJECTS}
        self.gift: tuple[str, str, str] | None = None

    def step(self) -> None:
        """One event: a random person does a random thing; drawn anew until that is possible."""
        rules = self._rules
        possible: list[tuple[str, ...]] = []
        while not possible:
            person, action = _pick(self._rng, rules.people), _pick(self._rng, rules.actions)
            possible = self._possible(person, action)
        what = _pick(self._rng, possible)
        self._perform(person, action, *what)
        self.facts.append(self._tell(person, action, *what))

    def _possible(self, person: str, action: _Action) -> list[tuple[str, ...]]:
        """What a person can do: (place), (object) or (object, receiver) for each way."""
        here = self.place[person]
        if action == "move":
            return [(place,) for place in PLACES if place != here]
        if action == "get":
            lying = (name for name in OBJECTS if name not in self.holder)
            return [(name,) for name in lying if self.place[name] == here]
        held = self._held_by(person)
        if action == "drop":
            return [(name,) for name in held]
        near = [p for p in self._rules.people if p != person and self.place[p] == here]
        return [(name, other) for name in held for other in near]

    def _perform(self, person: str, action: _Action, what: str, other: str = "") -> None:
        """Change the world, and what is told of it."""
        if action == "move":
            self.place[person] = what
            self.told.add(person)
        elif action == "get":
            self.holder[what] = person
        elif action == "drop":
            del self.holder[what]
        else:
            self.holder[what] = other
            self.gift = (person, what, other)
        # The hands that an object is in, or was dropped from, tell its place if theirs is told.
        # A reader could find out more (who takes what lies in the kitchen is there); what only
        # such inference tells is not asked for.
        for name in self._held_by(person) if action == "move" else [what]:
            hands = self.holder.get(name, person)
            self.place[name] = self.place[hands]
            (self.told.add if hands in self.told else self.told.discard)(name)
            self._travel(name)

    def _held_by(self, person: str) -> list[str]:
        return [name for name, holder in self.holder.items() if holder == person]

    def _travel(self, name: str) -> None:
        """Note an object's place if it is told and new."""
        journey = self.journey[name]
        if name in self.told and journey[-1:] != [self.place[name]]:
            journey.append(self.place[name])

    def _tell(self, person: str, action: _Action, what: str, other: str = "") -> str:
        """The sentence about an event."""
        verb = _pick(self._rng, _VERBS[action])
        if action in ("get", "drop"):
            other = " there" * (self._rng.random() < _THERE)
        elif action == "give":
            other = f" to {other}"
        return f"{person} {verb} the {what}{other}."


_Asked = tuple[str, str] | None
"""Question and answer; None while there is nothing to ask for."""


def _where_person(world: _World, rng: np.random.Generator) -> _Asked:
    """qa1."""
    person = _pick(rng, sorted(world.told))
    return f"Where is {person}?", world.place[person]


def _where_object(world: _World, rng: np.random.Generator) -> _Asked:
    """qa2."""
    known = [name for name in OBJECTS if name in world.told]
    if not known:
        return None
    name = _pick(rng, known)
    return f"Where is the {name}?", world.place[name]


def _where_before(world: _World, rng: np.random.Generator) -> _Asked:
    """qa3: one of the places that an object came to."""
    moved = [name for name in OBJECTS if len(world.journey[name]) > 1]
    if not moved:
        return None
    name = _pick(rng, moved)
    # A later arrival at the same place replaces an earlier one.
    came_from = dict(zip(world.journey[name][1:], world.journey[name], strict=False))
    place = _pick(rng, sorted(came_from))
    return f"Where was the {name} before the {place}?", came_from[place]


def _gift(world: _World, rng: np.random.Generator) -> _Asked:
    """qa5."""
    if world.gift is None:
        return None
    giver, what, receiver = world.gift
    forms = (
        (f"What did {giver} give to {receiver}?", what),
        (f"Who gave the {what}?", giver),
        (f"Who gave the {what} to {receiver}?", giver),
        (f"Who received the {what}?", receiver),
        (f"Who did {giver} give the {what} to?", receiver),
    )
    return _pick(rng, forms)


_ASK = {"qa1": _where_person, "qa2": _where_object, "qa3": _where_before, "qa5": _gift}


def _relations(rng: np.random.Generator) -> Story:
    """qa4: three places on a line, the first the farthest north or east."""
    first, middle, last = (str(place) for place in rng.permutation(PLACES)[:3])
    side, opposite = _pick(rng, _SIDES)
    facts = []
    for here, there in ((first, middle), (middle, last)):
        a, name, b = _pick(rng, ((here, side, there), (there, opposite, here)))
        facts.append(f"The {a} is {name} of the {b}.")
    name, answer = _pick(rng, ((side, first), (opposite, last)))
    if rng.integers(2):
        question = f"What is {name} of the {middle}?"
    else:
        question = f"What is the {middle} {opposite if name == side else side} of?"
    return Story(tuple(facts[i] for i in rng.permutation(2)), question, answer)


def check_short(name: str, short: bool, task: Task) -> None:
    """Raise ValueError if short stories are asked of a task that has no longer ones."""
    if short and task != "qa3":
        raise ValueError(f"{name}={short} is for qa3 alone, whose stories are long; not {task}")


_CARRIED = (
    "If a person got an item in the first location and travelled to the second location the item "
    "is also in the second location. If a person dropped an item in the first location and moved "
    "to the second location the item remains in the first location.\n"
    "Always return your answer in the following format:\n"
)
_FROM_FACTS = "You need to answer the question based only on the information from the facts."
_NOTHING_ELSE = "Do not write anything else after that."
_HIDDEN = "hidden in some random text and a question."

_DESCRIPTIONS: dict[Task, str] = {
    "qa1": "I will give you context with the facts about positions of different persons "
    f"{_HIDDEN} {_FROM_FACTS} If a person was in different locations, use the latest location to "
    "answer the question.\nAlways return your answer in the following format:\n"
    f"The most recent location of 'person' is 'location'. {_NOTHING_ELSE}",
    "qa2": "I will give you context with the facts about locations and actions of different "
    f"persons {_HIDDEN} {_FROM_FACTS} {_CARRIED}The 'item' is in 'location'. {_NOTHING_ELSE}",
    "qa3": "I give you context with the facts about locations and actions of different persons "
    f"{_HIDDEN} {_FROM_FACTS} {_CARRIED}"
    f"Before the $location_1$ the $item$ was in the $location_2$. {_NOTHING_ELSE}",
    "qa4": "I will give you context with the facts about different people, their location and "
    f"actions, {_HIDDEN} {_FROM_FACTS}\n"
    f"Your answer should contain only one word - location. {_NOTHING_ELSE}",
    "qa5": f"I will give you context with the facts about locations and their relations {_HIDDEN} "
    f"{_FROM_FACTS}\nYour answer should contain only one word. {_NOTHING_ELSE} Do not explain your "
    "answer.",
}
_EXAMPLES: dict[Task, tuple[str, str]] = {
    "qa1": (
        "Charlie went to the hallway. Judith come back to the kitchen. Charlie travelled to "
        "balcony.\nWhere is Charlie? The most recent location of Charlie is balcony.",
        "Alan moved to the garage. Charlie went to the beach. Alan went to the shop. Rouse "
        "travelled to balcony.\nWhere is Alan? The most recent location of Alan is shop.",
    ),
    "qa2": (
        "Charlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony.\n"
        "Where is the bottle? The bottle is in the balcony.",
        "Alan moved to the garage. Alan got a screw driver. Alan moved to the kitchen.\n"
        "Where is the screw driver? The screw driver is in the kitchen.",
    ),
    "qa3": (
        "John journeyed to the bedroom. Mary grabbed the apple. Mary went back to the bathroom. "
        "Daniel journeyed to the bedroom. Daniel moved to the garden. Mary travelled to the "
        "kitchen.\nWhere was the apple before the kitchen? "
        "Before the kitchen the apple was in the bathroom.",
        "John went back to the bedroom. John went back to the garden. John went back to the "
        "kitchen. Sandra took the football. Sandra travelled to the garden. Sandra journeyed to "
        "the bedroom.\nWhere was the football before the bedroom? "
        "Before the bedroom the football was in the garden.",
    ),
    "qa4": (
        "The hallway is south of the kitchen. The bedroom is north of the kitchen.\n"
        "What is the kitchen south of? bedroom",
        "The garden is west of the bedroom. The bedroom is west of the kitchen.\n"
        "What is west of the bedroom? garden",
    ),
    "qa5": (
        "Mary picked up the apple there. Mary gave the apple to Fred. Mary moved to the bedroom. "
        "Bill took the milk there.\nWho did Mary give the apple to? Fred",
        "Jeff took the football there. Jeff passed the football to Fred. Jeff got the milk there. "
        "Bill travelled to the bedroom.\nWho gave the football? Jeff",
    ),
}


def format_prompt(task: Task, context: str, question: str, template: Template = "public") -> str:
    """The prompt of a sample; the answer follows after a space.

    Args:
        task: which one.
        context: facts, or facts among filler.
        question: about it.
        template: ``public`` is the harness's: description, two solved examples, context and
            question; ``short`` is context and question alone.
    """
    blocks = [f"{context.strip()}\n{question.strip()}"]
    if template == "public":
        blocks = [_DESCRIPTIONS[task], *_EXAMPLES[task], *blocks]
    return "\n\n".join(blocks)

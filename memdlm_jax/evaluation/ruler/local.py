"""Local stand-ins for the documents of SQuAD and HotpotQA: invented people and towns.

The wording is ours and the facts are made up, so that nothing can be known by heart. Scores on them
are not comparable with those on the published questions.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from memdlm_jax.evaluation.ruler.documents import Asked


def _list(words: str) -> tuple[str, ...]:
    return tuple(words.split())


_FIRST_NAMES = _list(
    "Ada Albin Amara Anselm Astrid Barnaby Beatrix Bertil Carla Cedric Clara Conrad Dagny Daria "
    "Edgar Edith Elias Elsa Emil Erna Felix Flora Gerda Gideon Greta Harald Hedda Hugo Ida Ingrid "
    "Jonas Judith Karin Konrad Lena Leopold Lydia Magnus Marta Matthias Nadia Nils Olga Oscar "
    "Petra Philippa Quentin Rasmus Rosa Rupert Sabine Silas Stella Thea Tobias Ulrika Viktor Wanda"
)
_ROOTS = _list(
    "Al Ar Bar Bel Bor Bran Cal Car Cor Dal Dar Dor Dun El Fal Fen Gal Gar Glen Hal Har Hel Hol "
    "Kal Kel Kor Lan Lor Mal Mar Mel Mor Nor Or Pel Ral Ren Sel Sol Tal Tor Val Var Vel Wal Wen Yar"
)
_MIDDLES = _list("a e i o en er in el am os")
_SURNAME_ENDS = _list("berg dahl feld gren holt kamp lund mann nius quist rud sen ski stam vik zer")
_TOWN_ENDS = _list("bridge bury by combe dale fleet ford gate ham hurst ley mere port stead ton")
_RIVER_ENDS = _list("nna bra dra ga ka lva mna ppa ra sse tha va")
_TRADES = _list(
    "baker blacksmith bookbinder brewer carpenter chandler clockmaker cooper dyer farrier fletcher "
    "glassblower goldsmith hatter joiner locksmith mason miller painter potter printer roofer "
    "saddler sailmaker shoemaker tailor tanner thatcher weaver wheelwright"
)
_GOODS = _list(
    "apples barley bells bricks candles carpets chairs cheese cider clocks combs drums flutes "
    "glass gloves hats honey lace lanterns leather linen mirrors mustard paper pears pottery rope "
    "salt silk soap spoons tiles timber toys wool"
)
_NEIGHBOURS = 2


class LocalDocuments:
    """Paragraphs about invented people and towns, as many as are needed.

    One hop: a paragraph says where and when somebody was born and what became of them, and one of
    these facts is asked for. Two hops: a document says where somebody was born, another something
    about that town, and the second is asked for by way of the first. Every town has a document and
    people who were born there, so that none is asked about because it is mentioned.
    """

    size: int | None = None

    def __init__(self, two_hop: bool):
        """Choose between the stand-in for SQuAD and, with ``two_hop``, that for HotpotQA."""
        self._two_hop = two_hop

    def draw(self, rng: np.random.Generator, index: int) -> Asked:
        """A question about a new person."""
        del index  # There is no end of people.
        name, town = _person(rng), _name(rng, _TOWN_ENDS)
        return _two_hops(rng, name, town) if self._two_hop else _one_hop(rng, name, town)

    def others(self, asked: Asked, rng: np.random.Generator) -> Iterator[str]:
        """Endless documents about other people and towns than those of ``asked``."""
        seen = {_subject(document) for document in asked.gold}
        for document in itertools.chain(asked.related, self._documents(rng)):
            if _subject(document) not in seen:
                seen.add(_subject(document))
                yield document

    def _documents(self, rng: np.random.Generator) -> Iterator[str]:
        """Endless documents; two may be about the same."""
        while True:
            town = _name(rng, _TOWN_ENDS)
            if not self._two_hop:
                yield _life(rng, _person(rng), town)[0]
                continue
            yield _town_document(rng, town)[0]
            for _ in range(1 + _NEIGHBOURS):
                yield _person_document(rng, _person(rng), town)


def _one_hop(rng: np.random.Generator, name: str, town: str) -> Asked:
    document, facts = _life(rng, name, town)
    questions = (
        f"In which town was {name} born?",
        f"In which year was {name} born?",
        f"What was the trade of {name}?",
        f"In which town did {name} open a workshop?",
        f"In which year did {name} open a workshop?",
    )
    which = int(rng.integers(len(questions)))
    return Asked(questions[which], (facts[which],), (document,))


def _two_hops(rng: np.random.Generator, name: str, town: str) -> Asked:
    document, facts = _town_document(rng, town)
    questions = (
        f"On which river lies the town in which {name} was born?",
        f"In which year was the town founded in which {name} was born?",
        f"What is the town known for in which {name} was born?",
    )
    which = int(rng.integers(len(questions)))
    neighbours = (_person_document(rng, _person(rng), town) for _ in range(_NEIGHBOURS))
    gold = (_person_document(rng, name, town), document)
    return Asked(questions[which], (facts[which],), gold, tuple(neighbours))


def _life(rng: np.random.Generator, name: str, town: str) -> tuple[str, tuple[str, ...]]:
    """A paragraph, and its facts in the order of the questions."""
    born, trade, other = int(rng.integers(1600, 1900)), _one(rng, _TRADES), town
    opened = born + int(rng.integers(20, 40))
    while other == town:
        other = _name(rng, _TOWN_ENDS)
    text = (
        f"{name} was born in {town} in {born}. After some years as an apprentice {name} became a "
        f"{trade} and opened a workshop in {other} in {opened}."
    )
    return text, (town, str(born), trade, other, str(opened))


def _person_document(rng: np.random.Generator, name: str, town: str) -> str:
    until = rng.integers(1600, 1900)
    return f"{name}\n{name} was born in {town} and worked as a {_one(rng, _TRADES)} until {until}."


def _town_document(rng: np.random.Generator, town: str) -> tuple[str, tuple[str, ...]]:
    """A document, and its facts in the order of the questions."""
    river, goods, founded = _name(rng, _RIVER_ENDS), _one(rng, _GOODS), rng.integers(1100, 1600)
    text = (
        f"{town}\n{town} is a town on the river {river}. It was founded in {founded} and is known "
        f"for its {goods}."
    )
    return text, (river, str(founded), goods)


def _subject(document: str) -> str:
    """Whom or what a document is about."""
    return document.split("\n")[0].split(" was ")[0]


def _person(rng: np.random.Generator) -> str:
    return f"{_one(rng, _FIRST_NAMES)} {_name(rng, _SURNAME_ENDS)}"


def _name(rng: np.random.Generator, ends: Sequence[str]) -> str:
    """A name of root, middle and end."""
    return "".join(_one(rng, part) for part in (_ROOTS, _MIDDLES, ends))


def _one(rng: np.random.Generator, words: Sequence[str]) -> str:
    # Numpy's choice would make an array of the words each time.
    return words[int(rng.integers(len(words)))]

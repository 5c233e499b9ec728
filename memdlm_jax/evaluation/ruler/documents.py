"""RULER's two question tasks: the paragraphs of an answer among paragraphs that have none."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from memdlm_jax import storage
from memdlm_jax.evaluation.ruler.fitting import Draft, TokenCounter, shares

_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)
_HEAD = f"{_INSTRUCTION}\n\nThe following are given documents.\n\n"
_TAIL = f"\n\n{_INSTRUCTION}\n\nQuestion: "
_PREFIX = "Answer:"
# Merges at the seams of the pieces make a prompt longer or shorter than their sum.
_SEAMS = 4


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question about documents.

    Attributes:
        text: the question.
        references: right answers.
        gold: documents that the answer takes.
        related: documents that come first among the others, such as those of the same article.
    """

    text: str
    references: tuple[str, ...]
    gold: tuple[str, ...]
    related: tuple[str, ...] = ()


class Source(Protocol):
    """Where questions and documents come from.

    Attributes:
        size: number of questions; ``None`` for no end.
    """

    size: int | None

    def draw(self, rng: np.random.Generator, index: int) -> Asked:
        """Question ``index``."""

    def others(self, asked: Asked, rng: np.random.Generator) -> Iterator[str]:
        """Documents to hide those of a question among, each once."""


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """Published questions with their documents.

    Attributes:
        questions: those that have an answer.
        documents: all documents, sorted, each once.
        unanswerable: questions of the file without an answer, which RULER does not ask.
    """

    questions: tuple[Asked, ...]
    documents: tuple[str, ...]
    unanswerable: int = 0


def read_squad(path: str | Path) -> QuestionSet:
    """Questions of a SQuAD 2.0 file (Rajpurkar et al., arXiv 1806.03822), as published.

    A document is a paragraph; related are the other paragraphs of its article.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such file, or none of its questions has an answer.
    """
    return _read(path, _squad, 'SQuAD 2.0: {"data": [{"paragraphs": [{"context", "qas"}]}]}')


def read_hotpot(path: str | Path) -> QuestionSet:
    """Questions of a HotpotQA file with distractors (Yang et al., arXiv 1809.09600).

    A document is a title and, on the next line, its sentences. RULER puts all ten documents of a
    question into its prompt. Here the two that its ``supporting_facts`` name must be there, and the
    others are related: they come first, so long prompts hold all ten and short ones are possible.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such file.
    """
    return _read(path, _hotpot, 'HotpotQA: [{"question", "answer", "context", "supporting_facts"}]')


def _read(path: str | Path, parse: Any, form: str) -> QuestionSet:
    path = storage.path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no questions at {path}")
    try:
        found = parse(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no file of {form}: {error!r}") from error
    if not found.questions:
        raise ValueError(f"{path} has no question with an answer")
    return found


def _squad(data: Any) -> QuestionSet:
    questions: list[Asked] = []
    documents: set[str] = set()
    unanswerable = 0
    for article in data["data"]:
        paragraphs = [paragraph["context"] for paragraph in article["paragraphs"]]
        documents.update(paragraphs)
        for paragraph in article["paragraphs"]:
            text = paragraph["context"]
            related = tuple(dict.fromkeys(other for other in paragraphs if other != text))
            for asked in paragraph["qas"]:
                if asked["is_impossible"]:
                    unanswerable += 1
                    continue
                answers = tuple(dict.fromkeys(a["text"] for a in asked["answers"]))
                questions.append(Asked(asked["question"], _checked(answers), (text,), related))
    return QuestionSet(tuple(questions), tuple(sorted(documents)), unanswerable)


def _hotpot(data: Any) -> QuestionSet:
    questions: list[Asked] = []
    documents: set[str] = set()
    for asked in data:
        texts = {title: f"{title}\n{''.join(sentences)}" for title, sentences in asked["context"]}
        documents.update(texts.values())
        gold = tuple(dict.fromkeys(texts[title] for title, _ in asked["supporting_facts"]))
        related = tuple(text for text in texts.values() if text not in gold)
        questions.append(
            Asked(asked["question"], _checked((asked["answer"],)), _checked(gold), related)
        )
    return QuestionSet(tuple(questions), tuple(sorted(documents)))


def _checked(texts: tuple[Any, ...]) -> tuple[str, ...]:
    """The texts; TypeError unless there is one and all are text with something in it."""
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise TypeError(f"answers or documents {texts!r} must be non-empty strings")
    return texts


class FileDocuments:
    """The questions of a file whose documents fit, in an order drawn once.

    Attributes:
        size: number of questions that fit.
        left_out: number of questions with an answer that do not fit.
        least_tokens: tokens of the shortest prompt.
    """

    size: int | None

    def __init__(
        self, found: QuestionSet, counter: TokenCounter, limit: int, rng: np.random.Generator
    ):
        """Keep the questions that fit.

        Args:
            found: questions and documents.
            counter: counts tokens.
            limit: tokens of the prompt.
            rng: draws the order.
        """
        costs = [_least_tokens(asked, counter) for asked in found.questions]
        fitting = [i for i, cost in enumerate(costs) if cost <= limit]
        self._questions = [found.questions[i] for i in rng.permutation(fitting).astype(int)]
        self._documents = found.documents
        self.size = len(fitting)
        self.left_out = len(costs) - len(fitting)
        self.least_tokens = min(costs)

    def draw(self, rng: np.random.Generator, index: int) -> Asked:
        """Question ``index``, in [0, size)."""
        del rng  # The order was drawn before.
        return self._questions[index]

    def others(self, asked: Asked, rng: np.random.Generator) -> Iterator[str]:
        """The related documents, then all others, each in drawn order."""
        first = {*asked.gold, *asked.related}
        yield from (asked.related[i] for i in rng.permutation(len(asked.related)))
        drawn = (self._documents[i] for i in rng.permutation(len(self._documents)))
        yield from (document for document in drawn if document not in first)


class Documents:
    """Prompts of ``ruler_qa_squad`` and ``ruler_qa_hotpot``.

    As in RULER the documents of the question come first, then related ones, then any, all shuffled.
    To fill the length, the last document that was taken is cut to a word; it is never one that the
    answer takes.
    """

    def __init__(self, source: Source, counter: TokenCounter):
        """Ask the questions of ``source``."""
        self.size = source.size
        self._source = source
        self._counter = counter

    def draw(self, rng: np.random.Generator, index: int) -> Asked:
        """Question ``index``."""
        return self._source.draw(rng, index)

    def build(self, drawn: Asked, rng: np.random.Generator, room: int) -> Draft:
        """The documents of the question with ``room`` tokens of others."""
        documents = [*drawn.gold, *self._others(drawn, rng, room)]
        order = rng.permutation(len(documents))
        texts = [_numbered(i, documents[j]) for i, j in enumerate(order, start=1)]
        before = shares([self._counter.piece(text) for text in texts])
        gold = range(len(drawn.gold))
        return Draft(
            question=_HEAD + "\n\n".join(texts) + _TAIL + drawn.text,
            separator=" ",
            prefix=_PREFIX,
            response=f" {drawn.references[0]}",
            references=drawn.references,
            depths=tuple(before[place] for place, j in enumerate(order) if j in gold),
        )

    def _others(self, asked: Asked, rng: np.random.Generator, room: int) -> list[str]:
        """Documents that fill ``room``."""
        found: list[str] = []
        for document in self._source.others(asked, rng):
            header = self._counter.piece(_header(len(asked.gold) + len(found) + 1))
            cost = header + self._counter.piece(document)
            if cost > room:
                part = self._counter.first_words(document, room - header)
                return [*found, part] if part else found
            found.append(document)
            room -= cost
        return found


def _header(number: int) -> str:
    return f"\n\nDocument {number}:\n"


def _numbered(number: int, document: str) -> str:
    return f"Document {number}:\n{document}"


def _least_tokens(asked: Asked, counter: TokenCounter) -> int:
    """Tokens of a prompt with the documents of the answer alone, generously."""
    headers = [_header(number) for number, _ in enumerate(asked.gold, start=1)]
    texts = [_HEAD, *headers, *asked.gold, _TAIL, asked.text, f" {_PREFIX}"]
    total = sum(map(counter.piece, texts))
    return total + _SEAMS + total // 100

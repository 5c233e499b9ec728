"""One RULER task at one length: its samples and their score."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memdlm_jax.data.example import Example
from memdlm_jax.data.needles import string_match_all
from memdlm_jax.data.text import check_at_least
from memdlm_jax.evaluation.ruler.config import NEEDLE_KINDS, RulerConfig
from memdlm_jax.evaluation.ruler.documents import (
    Documents,
    FileDocuments,
    QuestionSet,
    read_hotpot,
    read_squad,
)
from memdlm_jax.evaluation.ruler.fitting import Builder, Draft, TokenCounter, TokenizerLike, fit
from memdlm_jax.evaluation.ruler.local import LocalDocuments
from memdlm_jax.evaluation.ruler.needles import Needles
from memdlm_jax.evaluation.ruler.tracking import Tracking
from memdlm_jax.evaluation.ruler.words import CommonWords, FrequentWords

LEAST_FILL = 0.95
"""Share of its length that every sample has."""

_DRAWS = 30
_PROBES = 32
_SHORTER = {
    "ruler_vt": ", take with_example=False or fewer num_hops",
    "ruler_cwe": ", take with_example=False or fewer num_common",
    "niah_multikey_1": ", take fewer num_keys",
    "niah_multiquery": ", take fewer num_keys",
    "niah_multivalue": ", take fewer num_values",
}


@dataclasses.dataclass(frozen=True)
class RulerSample:
    """One question.

    Attributes:
        task: name of the task.
        index: number of the sample.
        prompt: all that the model is given; it ends with ``prefix``.
        prefix: the start of the answer, for callers that let it open the response's turn.
        response: what a right answer goes on with, leading space included.
        response_tokens: tokens of ``response``. Where they are more than the answer's budget, as
            they may be for a tokenizer of short tokens, raise ``max_new_tokens``.
        references: what the score looks for.
        length: tokens of ``prompt``, of the answer's budget and of the reserve together.
        depths: share of the context's tokens before each thing to find, in the order of the
            context, in [0, 1]; empty for the counting tasks.
        is_standard: whether it is a sample of the definition's task, not of a variant.
    """

    task: str
    index: int
    prompt: str
    prefix: str
    response: str
    response_tokens: int
    references: tuple[str, ...]
    length: int
    depths: tuple[float, ...]
    is_standard: bool

    def example(self, group: str) -> Example:
        """The sample as a row: the start of the answer opens the response's turn.

        The white space between question and start of the answer becomes the change of turns.
        """
        question = self.prompt.removesuffix(self.prefix).rstrip()
        return Example(question, self.response, group, "ruler", prefix=f" {self.prefix}")


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """RULER's score of questions: 1 if some reference occurs in the prediction, else 0.

    Compared as ``string_match_all`` does. (The harness takes the mean where a question has several
    references; RULER the best, and so does this.)

    Raises:
        ValueError: there are no references.
    """
    string_match_all(prediction, references)
    return max(string_match_all(prediction, [reference]) for reference in references)


class RulerTask:
    """Samples of one task at one length (Hsieh et al., arXiv 2404.06654).

    Prompts are RULER's to the character. ``sample(index)`` is a pure function of the settings, the
    tokenizer and the material, in any order; tasks, lengths and other settings have draws of their
    own. A draw whose fixed parts happen not to fit is drawn again.

    Attributes:
        config: the settings.
        max_new_tokens: tokens that the answer may have.
        is_standard: whether all settings and, for questions, the documents are the definition's.
            The text of a haystack is the caller's (RULER's is essays).
        size: number of samples; ``None`` for no end.
        left_out: questions of the file that do not fit the length; 0 for tasks without a file.
        least_length: length at which the fixed parts of samples fit; of a file, those of its
            shortest question.
    """

    def __init__(
        self,
        config: RulerConfig,
        tokenizer: TokenizerLike | TokenCounter,
        *,
        sentences: Sequence[str] = (),
        documents: str | Path | QuestionSet | None = None,
    ):
        """Read the material and check that the fixed parts fit.

        Args:
            config: task, length and settings.
            tokenizer: an object with ``encode``, a function of a text, or a ``TokenCounter`` that
                several tasks share. What ``encode`` adds to a text (a token for its start) counts.
            sentences: text of the haystacks, of the tasks whose needles stand in text; the others
                do not look at it.
            documents: a SQuAD 2.0 or HotpotQA file, or what ``read_squad`` or ``read_hotpot`` made
                of it, for the question tasks; the others do not look at it. ``None`` is the local
                stand-in, which is a variant.

        Raises:
            TypeError: ``sentences`` is one string.
            ValueError: the length is too short, or the task's text is missing.
            FileNotFoundError: there is no file of documents.
            ImportError: the word lists are not installed.
        """
        if isinstance(sentences, str):
            raise TypeError("sentences is one string: it must be a sequence of sentences")
        self.config = config
        self.max_new_tokens = config.answer_tokens
        self._counter = (
            tokenizer if isinstance(tokenizer, TokenCounter) else TokenCounter(tokenizer)
        )
        self._limit = config.length - config.reserved_tokens - self.max_new_tokens
        self._asks = config.task.startswith("ruler_qa")
        self._local = self._asks and documents is None
        self.is_standard = config.is_standard and not self._local
        self.left_out = 0
        beside = config.length - self._limit
        if self._asks and documents is not None:
            source = self._file(documents)
            self.left_out, self.least_length = source.left_out, beside + source.least_tokens
            self._builder: Builder = Documents(source, self._counter)
        else:
            self._builder = self._make_builder(sentences)
            self.least_length = beside + self._least_tokens()
        self.size = self._builder.size
        if self.least_length > config.length:
            raise ValueError(
                f"length={config.length} must be at least {self.least_length} for {config.task}: "
                f"that many tokens take its fixed parts, {self.max_new_tokens} of the answer and "
                f"{config.reserved_tokens} reserved; raise it{_SHORTER.get(config.task, '')} or "
                "lower max_new_tokens"
            )

    def sample(self, index: int) -> RulerSample:
        """Sample ``index``, from 0 on.

        Its length is at most ``config.length`` and at least 95 % of it.

        Raises:
            ValueError: ``index`` is out of range, or the material cannot fill the length.
        """
        check_at_least("index", index, 0)
        if self.size is not None and index >= self.size:
            raise ValueError(
                f"index={index} must be below {self.size}: so many questions of the file fit "
                f"length={self.config.length}, {self.left_out} do not"
            )
        most = 0
        for attempt in range(_DRAWS):
            fitted = self._fitted(index, attempt)
            length = fitted[1] + self.config.length - self._limit if fitted else 0
            if fitted and length >= LEAST_FILL * self.config.length:
                return self._sample(index, fitted[0], length)
            most = max(most, length)
        material = "documents" if self._asks else "sentences of shorter words"
        raise ValueError(
            f"{self.config.task} can fill {most} of length={self.config.length} tokens in sample "
            f"{index}, less than {LEAST_FILL:.0%}: give more {material} or take another length"
        )

    def score(self, sample: RulerSample, reply: str) -> float:
        """Score of a reply in [0, 1]: ``string_match_part`` for questions, else the share found."""
        match = string_match_part if self._asks else string_match_all
        return match(reply, sample.references)

    def _file(self, documents: str | Path | QuestionSet) -> FileDocuments:
        """The questions of a file."""
        if not isinstance(documents, QuestionSet):
            read = read_squad if self.config.task == "ruler_qa_squad" else read_hotpot
            documents = read(documents)
        return FileDocuments(documents, self._counter, self._limit, self._rng("order"))

    def _make_builder(self, sentences: Sequence[str]) -> Builder:
        """What makes the prompts of a task without a file."""
        config, counter = self.config, self._counter
        if config.task in NEEDLE_KINDS:
            return Needles(config, counter, sentences)
        if self._asks:
            local = LocalDocuments(two_hop=config.task == "ruler_qa_hotpot")
            return Documents(local, counter)
        if config.task == "ruler_vt":
            return Tracking(config, counter)
        return (CommonWords if config.task == "ruler_cwe" else FrequentWords)(config, counter)

    def _least_tokens(self) -> int:
        """Tokens of the fixed parts of some draws; they are the same draws at every length."""
        most = 0
        for probe in range(_PROBES):
            rng = np.random.default_rng(probe)
            draft = self._builder.build(self._builder.draw(rng, probe), rng, 0)
            most = max(most, self._counter.count(draft.prompt))
        return most

    def _fitted(self, index: int, attempt: int) -> tuple[Draft, int] | None:
        """The draft of a sample with its tokens; ``None`` if its fixed parts do not fit."""
        drawn = self._builder.draw(self._rng("draw", index, attempt), index)

        def build(room: int) -> Draft:
            return self._builder.build(drawn, self._rng("build", index, attempt), room)

        return fit(build, self._counter, self._limit)

    def _sample(self, index: int, draft: Draft, length: int) -> RulerSample:
        return RulerSample(
            task=self.config.task,
            index=index,
            prompt=draft.prompt,
            prefix=draft.prefix,
            response=draft.response,
            response_tokens=self._counter.piece(draft.response),
            references=draft.references,
            length=length,
            depths=draft.depths,
            is_standard=self.is_standard and draft.is_standard,
        )

    def _rng(self, *purpose: Any) -> np.random.Generator:
        """A generator that hangs on the settings and the purpose alone."""
        c = self.config
        settings = sorted(c.settings.items())
        name = repr((c.task, c.length, c.seed, c.reserved_tokens, settings, self._local, purpose))
        return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()))

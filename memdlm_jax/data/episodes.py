"""Episodes: a text to write into memory, and questions that are asked when the text is gone.

A text is a list of *pieces* (sentences, facts, turns) that stay whole. ``pack`` puts them into
segments, which the model reads one by one. ``EpisodeBatches`` makes training batches: some texts,
and for each of them as many questions. Every batch is a pure function of the step.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from memdlm_jax import storage
from memdlm_jax.data.example import Example
from memdlm_jax.data.needles import NEEDLE, key_parts
from memdlm_jax.data.sft import EncodeConfig, Encoder, Row
from memdlm_jax.data.sources import split_of
from memdlm_jax.data.text import SPLITS, Split, check_at_least, check_choice, split_sentences
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.typing import Batch, Texts

WORDINGS = (
    "What is the special magic number for {key} mentioned in the provided text?",
    "What is the special magic number for {key}?",
    "What is the magic number for {key}?",
)
"""Questions about a needle in training; evaluation asks the first, which is RULER's."""

OPENING = "The special magic number for {key} mentioned in the provided text is "
"""Half of the training questions are text that the answer completes: they are learnt first."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """A text and questions about it.

    Attributes:
        pieces: what the text consists of, in order; a piece is never cut if a segment can hold it.
        questions: prompt, without the text, and response.
        answers: strings of the pieces that the questions ask for. A curriculum may weigh their
            tokens more than others.
        group: what must stay together in one split.
    """

    pieces: tuple[str, ...]
    questions: tuple[Example, ...]
    answers: tuple[str, ...] = ()
    group: str = ""

    def __post_init__(self):
        if not any(piece.strip() for piece in self.pieces):
            raise ValueError(f"context of episode {self.group!r} is empty")
        if not self.questions:
            raise ValueError(f"episode {self.group!r} has no question")


class Episodes(Protocol):
    """Where episodes come from."""

    def episode(self, seed: int, index: int) -> Episode:
        """Episode ``index`` of the stream ``seed``: a pure function of both, in any order."""
        ...


@dataclasses.dataclass(frozen=True)
class NeedleEpisodes:
    """Keys with magic numbers, alone or among sentences, and a question for each key.

    Attributes:
        keys: needles of a text.
        tokens: length of the text that sentences fill up, about; 0 for needles alone.
        questions: keys that are asked for.
        split: whose words the keys are made of.
        tokenizer: counts the tokens.
        sentences: fill the text; from the same split.
    """

    keys: int
    tokens: int
    questions: int
    split: Split
    tokenizer: Tokenizer
    sentences: tuple[str, ...] = ()

    def __post_init__(self):
        check_at_least("keys", self.keys, 1)
        check_at_least("tokens", self.tokens, 0)
        check_choice("split", self.split, SPLITS)
        if not 1 <= self.questions <= self.keys:
            raise ValueError(f"questions={self.questions} must be from 1 to keys={self.keys}")
        if self.tokens and not self.sentences:
            raise ValueError(f"tokens={self.tokens} needs sentences to fill the text with")

    def episode(self, seed: int, index: int) -> Episode:
        """See ``Episodes``."""
        rng = np.random.default_rng([seed, SPLITS.index(self.split), self.keys, self.tokens, index])
        (words,) = key_parts(1, self.split)
        keys = [words[i] for i in rng.choice(len(words), self.keys, replace=False)]
        values = [str(100 + i) for i in rng.choice(900, self.keys, replace=False)]
        pieces = [NEEDLE.format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
        for sentence in self._filler(rng, pieces):
            pieces.insert(int(rng.integers(len(pieces) + 1)), sentence)
        questions = []
        for i in rng.choice(self.keys, self.questions, replace=False):
            wording, prefix = WORDINGS[0], ""
            if self.split == "train":
                wording = WORDINGS[int(rng.integers(len(WORDINGS)))]
                if rng.random() < 0.5:
                    wording, prefix = "", OPENING.format(key=keys[i])
            prompt, group = wording.format(key=keys[i]), f"needle/{keys[i]}"
            questions.append(Example(prompt, values[i], group, "needles", prefix))
        return Episode(tuple(pieces), tuple(questions), tuple(values), f"needles/{seed}/{index}")

    def _filler(self, rng: np.random.Generator, pieces: Sequence[str]) -> Iterator[str]:
        room = self.tokens - sum(map(self._size, pieces))
        while self.tokens:
            sentence = self.sentences[int(rng.integers(len(self.sentences)))]
            room -= self._size(sentence)
            if room < 0:
                return
            yield sentence

    def _size(self, text: str) -> int:
        return _count(self.tokenizer, text)


@functools.lru_cache(maxsize=100_000)
def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(" " + text))


@dataclasses.dataclass(frozen=True)
class ListedEpisodes:
    """Given episodes; every stream goes through all of them in an order of its own.

    Attributes:
        episodes: at least one.
    """

    episodes: tuple[Episode, ...]

    def __post_init__(self):
        if not self.episodes:
            raise ValueError("episodes is empty")

    def episode(self, seed: int, index: int) -> Episode:
        """See ``Episodes``."""
        round_, place = divmod(index, len(self.episodes))
        order = _order(seed, round_, len(self.episodes))
        return self.episodes[order[place]]


@functools.lru_cache(maxsize=4)
def _order(seed: int, round_: int, count: int) -> Int[np.ndarray, "n"]:
    return np.random.default_rng([seed, round_]).permutation(count)


def jsonl_episodes(path: str | Path, split: Split | None = None) -> list[Episode]:
    """Episodes of a JSON-lines file, one object a line; blank lines are skipped.

    A line has ``context``, a string or a list of messages ``{"role": ..., "content": ...}``, and
    either ``prompt`` and ``response`` or ``questions``, a list of such pairs. ``group`` says what
    stays in one split; without it lines with the same context do. With ``"answer_in_context":
    true`` each response must be a part of the context.

    Args:
        path: the file.
        split: which groups; ``None`` for all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is no JSON object, or a field is missing or wrong; names file and line.
    """
    path = storage.path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no JSON-lines file at {path}")
    found = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}:{number}"
                try:
                    episode = _episode_of(json.loads(line), path.name)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{place}: {error}") from error
                if split is None or split_of(episode.group) == split:
                    found.append(episode)
    return found


def _episode_of(fields: Any, source: str) -> Episode:
    if not isinstance(fields, dict):
        raise TypeError(f"a line must be a JSON object, not {type(fields).__name__}")
    pieces = pieces_of(_context(fields.get("context")))
    text = " ".join(pieces)
    group = fields.get("group", f"context/{hashlib.sha256(text.encode()).hexdigest()[:16]}")
    if not isinstance(group, str) or not group:
        raise ValueError(f"field 'group' is {group!r}, must be a non-empty string")
    asked = fields.get("questions", [fields])
    if not isinstance(asked, list) or not all(isinstance(one, dict) for one in asked):
        raise ValueError("field 'questions' must be a list of objects")
    questions = []
    for one in asked:
        pair = []
        for name in ("prompt", "response"):
            if not isinstance(one.get(name), str) or not one[name].strip():
                raise ValueError(f"field {name!r} is {one.get(name)!r}, must be a non-empty string")
            pair.append(one[name])
        if fields.get("answer_in_context") and pair[1].strip() not in text:
            raise ValueError(
                f"response {pair[1]!r} must be in the context: 'answer_in_context' is true"
            )
        prompt, response = pair
        if f" {response}" in text:  # Its tokens are then those of the text.
            response = f" {response}"
        questions.append(Example(prompt, response, group, source))
    answers = tuple(q.response.strip() for q in questions if q.response.strip() in text)
    return Episode(pieces, tuple(questions), answers, group)


def _context(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"field 'context' is {value!r}, must be a non-empty string or a list of messages"
        )
    lines = []
    for number, message in enumerate(value):
        for name in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(name), str):
                raise ValueError(f"context[{number}] must be an object with 'role' and 'content'")
        lines.append(f"{message['role'].capitalize()}: {message['content']}")
    return "\n".join(lines)


def pieces_of(text: str) -> tuple[str, ...]:
    """The sentences of a text, line by line: what ``Episode.pieces`` holds."""
    return tuple(s for line in text.splitlines() for s in split_sentences(line))


def pack(pieces: Sequence[Sequence[int]], width: int) -> list[list[int]]:
    """Put pieces into segments of at most ``width`` tokens, in order; no segment is empty.

    A piece begins a new segment if it does not fit into the current one. A piece that is longer
    than a segment is cut after every ``width`` tokens.
    """
    segments: list[list[int]] = []
    for piece in pieces:
        for start in range(0, len(piece), width):
            part = piece[start : start + width]
            if not segments or len(segments[-1]) + len(part) > width:
                segments.append([])
            segments[-1].extend(part)
    return segments


def encode_text(tokenizer: Tokenizer, text: str, width: int) -> Texts:
    """A text as one row of ``Texts``, in as many segments of ``width`` tokens as it takes.

    Raises:
        ValueError: the text is empty.
    """
    segments = pack([tokenizer.encode(f" {piece}") for piece in pieces_of(text)], width)
    if not segments:
        raise ValueError("the text is empty: there is nothing to write")
    tokens, valid = _filled([segments], len(segments), width, tokenizer.pad_id)
    return Texts(tokens, valid)


def _filled(texts: Sequence[Sequence[Sequence[int]]], segments: int, width: int, fill: int):
    """([t, m, k] tokens, valid)."""
    tokens = np.full((len(texts), segments, width), fill, np.int32)
    valid = np.zeros(tokens.shape, bool)
    for t, text in enumerate(texts):
        for m, segment in enumerate(text):
            tokens[t, m, : len(segment)] = segment
            valid[t, m, : len(segment)] = True
    return tokens, valid


@dataclasses.dataclass(frozen=True)
class EpisodeConfig:
    """Sizes of a batch of episodes, and the curriculum of its token weights.

    Attributes:
        texts: of a batch.
        questions: of each text.
        segment: tokens of a segment.
        segments: of a text, at most; an episode with a longer text is an error.
        length: tokens of a question with its answer, at most; a longer one is an error.
        focus: weight of the tokens of ``Episode.answers`` at step 0, others weigh 0; from step
            ``hold`` on both move linearly to 1, which they reach after ``ramp`` more steps. 0: all
            tokens weigh 1 from the start.
        hold: steps that look at answers alone.
        ramp: steps from there until all tokens weigh the same.
        seed: of the stream of episodes.
    """

    texts: int = 16
    questions: int = 4
    segment: int = 64
    segments: int = 1
    length: int = 32
    focus: float = 0.0
    hold: int = 0
    ramp: int = 1
    seed: int = 0

    def __post_init__(self):
        for field in ("texts", "questions", "segment", "segments", "length", "ramp"):
            check_at_least(field, getattr(self, field), 1)
        for field in ("hold", "seed"):
            check_at_least(field, getattr(self, field), 0)
        if self.focus < 0:
            raise ValueError(f"focus={self.focus} must be at least 0")

    def weights(self, step: int) -> tuple[float, float]:
        """(weight of answers, weight of all other tokens) at this step."""
        if not self.focus:
            return 1.0, 1.0
        moved = min(1.0, max(0, step - self.hold) / self.ramp)
        return self.focus + (1 - self.focus) * moved, moved


class EpisodeBatches:
    """Batches of episodes; ``training.feed.Batches``."""

    def __init__(self, episodes: Episodes, tokenizer: Tokenizer, config: EpisodeConfig):
        """Keep the source.

        Args:
            episodes: where they come from.
            tokenizer: of the model.
            config: sizes.
        """
        self.episodes, self.tokenizer, self.config = episodes, tokenizer, config
        self._encoder = Encoder(tokenizer, EncodeConfig(config.length, long_response="error"))
        self._encode = functools.lru_cache(maxsize=50_000)(self._encode_piece)

    def target_capacity(self, length: int) -> int:
        """Most tokens of any response: what a question leaves."""
        return min(length, self.config.length)

    def batch_at(self, step: int) -> Batch:
        """The batch of a step, numpy arrays; its rows are the questions of text 0, then of text 1.

        Raises:
            ValueError: an episode does not fit ``config``, naming its group.
        """
        c = self.config
        first = step * c.texts
        episodes = [self.episodes.episode(c.seed, first + i) for i in range(c.texts)]
        return self.batch_of(episodes, *c.weights(step))

    def batch_of(
        self, episodes: Sequence[Episode], answers: float = 1.0, others: float = 1.0
    ) -> Batch:
        """Given episodes as one batch, with these weights of the tokens of answers and of others.

        Raises:
            ValueError: see ``batch_at``.
        """
        c = self.config
        texts, marks = zip(*map(self._segments, episodes), strict=True)
        tokens, valid = _filled(texts, c.segments, c.segment, self.tokenizer.pad_id)
        weight: Any = None
        if answers != others or answers != 1.0:
            found, _ = _filled(marks, c.segments, c.segment, 0)
            weight = np.where(found, answers, others).astype(np.float32)
        rows = [row for episode in episodes for row in self._questions(episode)]
        context = Texts(tokens, valid, weight)
        return _batch(rows, c.length, self.tokenizer.pad_id, context)

    def _segments(self, episode: Episode) -> tuple[list[list[int]], list[list[int]]]:
        """(ids, 1 where they belong to an answer) of the segments of a text."""
        c = self.config
        encoded = [self._encode(piece, episode.answers) for piece in episode.pieces]
        ids, marks = (pack([piece[k] for piece in encoded], c.segment) for k in (0, 1))
        if len(ids) > c.segments:
            raise ValueError(
                f"context of episode {episode.group!r} takes {len(ids)} segments of {c.segment} "
                f"tokens; segments={c.segments} must be at least that"
            )
        return ids, marks

    def _encode_piece(self, piece: str, answers: tuple[str, ...]) -> tuple[list[int], list[int]]:
        """Ids of a piece, and 1 for those of an answer in it."""
        ids = self.tokenizer.encode(f" {piece}")
        for answer in answers:
            # Two encodings that share what comes before the answer: no offsets are needed.
            before, found, _ = piece.partition(answer)
            if found:
                start = len(self.tokenizer.encode(f" {before}".rstrip()))
                end = len(self.tokenizer.encode(f" {before}{answer}"))
                return ids, [int(start <= i < end) for i in range(len(ids))]
        return ids, [0] * len(ids)

    def _questions(self, episode: Episode) -> list[Row]:
        c, rows = self.config, []
        if len(episode.questions) < c.questions:
            raise ValueError(
                f"episode {episode.group!r} has {len(episode.questions)} questions, fewer than "
                f"questions={c.questions}"
            )
        for question in episode.questions[: c.questions]:
            row = self._encoder.encode(question)
            if isinstance(row, str):
                raise ValueError(
                    f"a question of episode {episode.group!r} with its answer has more than "
                    f"length={c.length} tokens"
                )
            rows.append(row)
        return rows


class VisibleRows:
    """Ordinary rows without any text to write, so that the model keeps what it could do before.

    A batch has one empty text: its memory is phi_0, which leaves the model unchanged.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Tokenizer,
        *,
        rows: int,
        length: int,
        segment: int,
        seed: int = 0,
    ):
        """Encode the examples.

        Args:
            examples: prompt, with whatever it needs to know, and response.
            tokenizer: of the model.
            rows: of a batch.
            length: tokens of a row, at most; longer examples are left out.
            segment: width of the empty text.
            seed: of the draw of rows.

        Raises:
            ValueError: no example fits.
        """
        encoder = Encoder(tokenizer, EncodeConfig(length))
        encoded = (encoder.encode(example) for example in examples)
        self._rows = [row for row in encoded if isinstance(row, Row)]
        if not self._rows:
            raise ValueError(f"length={length} is too short for each of {len(examples)} examples")
        self.rows, self.length, self.seed, self._pad_id = rows, length, seed, tokenizer.pad_id
        nothing: Any = _filled([[]], 1, segment, tokenizer.pad_id)
        self._context = Texts(*nothing)

    def target_capacity(self, length: int) -> int:
        """Most tokens of any response."""
        return min(length, max(len(row.tokens) - row.prompt_length for row in self._rows))

    def batch_at(self, step: int) -> Batch:
        """The batch of a step, numpy arrays; rows are drawn with replacement."""
        rng = np.random.default_rng([self.seed, step])
        drawn = [self._rows[i] for i in rng.integers(len(self._rows), size=self.rows)]
        return _batch(drawn, self.length, self._pad_id, self._context)


def _batch(rows: Sequence[Row], length: int, pad_id: int, context: Texts) -> Batch:
    shape = (len(rows), length)
    tokens: Any = np.full(shape, pad_id, np.int32)
    maskable: Any = np.zeros(shape, bool)
    valid: Any = np.zeros(shape, bool)
    for i, row in enumerate(rows):
        end = len(row.tokens)
        tokens[i, :end] = row.tokens
        maskable[i, row.prompt_length : end] = True
        valid[i, :end] = True
    return Batch(tokens, maskable, valid, context=context)

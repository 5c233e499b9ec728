"""Batches for pretraining: running text and needle questions, drawn anew at every step.

Batch ``step`` is a pure function of (config, step), so the data position is the step itself.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import numpy as np

from memdlm_jax.data.corpora import SourceConfig
from memdlm_jax.data.filler import Filler
from memdlm_jax.data.needles import NeedleConfig, NeedleTask, Template, wording
from memdlm_jax.data.sft import EncodeConfig, Encoder, Row
from memdlm_jax.data.text import Split, check_at_least
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.progress import Progress
from memdlm_jax.typing import Batch

ANSWER_SLOTS = 16
"""Target slots of a needle row: its answer is shorter."""

MOST_EXTRA_EOS = 5
"""An answer is followed by 0 .. this many further ends, so that a longer canvas is filled up."""


@dataclasses.dataclass(frozen=True)
class PretrainingConfig:
    """What a pretraining run reads.

    Attributes:
        seed: of all draws.
        source: corpus of the running text and of the needles' haystacks.
        text_length: tokens of a row of running text.
        text_rows: rows of a text batch.
        needle_lengths: lengths of needle batches, in turn; none may be ``text_length``.
        needle_tokens: tokens of a needle batch; it has needle_tokens / length rows.
        needle_share: share of the batches that are needle batches, in [0, 1].
        needle_only_batches: the run opens with this many needle batches and no text. Retrieval
            forms first where nothing competes with it, and stays.
        max_keys: each needle row has 1 .. max_keys keys, as many as fit.
    """

    seed: int = 0
    source: SourceConfig = dataclasses.field(
        default_factory=lambda: SourceConfig("chitchat_and_topics")
    )
    text_length: int = 256
    text_rows: int = 16
    needle_lengths: tuple[int, ...] = (96, 128, 192, 320, 512)
    needle_tokens: int = 3072
    needle_share: float = 0.5
    needle_only_batches: int = 0
    max_keys: int = 8

    def __post_init__(self):
        for name in ("text_length", "text_rows", "max_keys"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("needle_only_batches", self.needle_only_batches, 0)
        if self.text_length in self.needle_lengths:
            raise ValueError(
                f"needle_lengths={self.needle_lengths} must not hold text_length="
                f"{self.text_length}: a batch's length tells its kind"
            )
        if not 0 <= self.needle_share <= 1:
            raise ValueError(f"needle_share={self.needle_share} must lie in [0, 1]")
        if (self.needle_share or self.needle_only_batches) and not self.needle_lengths:
            raise ValueError(
                f"needle_lengths is empty, but needle_share={self.needle_share} and "
                f"needle_only_batches={self.needle_only_batches} ask for needle batches"
            )
        if self.needle_lengths and self.needle_tokens < max(self.needle_lengths):
            raise ValueError(
                f"needle_tokens={self.needle_tokens} must be at least the longest of "
                f"needle_lengths={self.needle_lengths}"
            )


class PretrainingMix:
    """``batch_at(step)`` alternates text and needle batches in the configured share."""

    def __init__(
        self,
        config: PretrainingConfig,
        tokenizer: Tokenizer,
        stream: np.ndarray,
        sentences: Sequence[str],
        split: Split = "train",
    ):
        """Prepare the needle tasks.

        Args:
            config: the mixture.
            tokenizer: encodes needle rows; its pad id fills them.
            stream: [n] int32, the running text, see ``text_stream``.
            sentences: haystack of the needle rows.
            split: whose key words the needles use.

        Raises:
            ValueError: if the stream is not longer than a row, or a needle length too short.
        """
        if len(stream) <= config.text_length:
            raise ValueError(
                f"the text has {len(stream)} tokens, it must be longer than one row of "
                f"text_length={config.text_length}"
            )
        self.config, self.split = config, split
        self._tokenizer, self._stream = tokenizer, stream
        self._encoder = Encoder(tokenizer, EncodeConfig(max(config.needle_lengths, default=8)))
        filler = Filler(sentences, tokenizer)
        self._tasks = {
            length: _tasks(length, config.max_keys, tokenizer, filler, split)
            for length in config.needle_lengths
        }

    def batch_at(self, step: int) -> Batch:
        """The batch of a step: numpy arrays [rows, length]."""
        rng = np.random.default_rng([self.config.seed, step])
        before = self._needle_batches_before(step)
        if self._needle_batches_before(step + 1) == before:
            return self._text_batch(rng)
        lengths = self.config.needle_lengths
        return self._needle_batch(rng, lengths[before % len(lengths)], step)

    def _needle_batches_before(self, step: int) -> int:
        first = min(step, self.config.needle_only_batches)
        return first + int((step - first) * self.config.needle_share)

    def iterate(self, start_step: int) -> Iterator[Batch]:
        """Batches from ``start_step`` on, without end."""
        step = start_step
        while True:
            yield self.batch_at(step)
            step += 1

    def target_capacity(self, length: int) -> int:
        """Most target slots that a row of this batch length can need."""
        return length if length == self.config.text_length else ANSWER_SLOTS

    def _text_batch(self, rng: np.random.Generator) -> Batch:
        c = self.config
        starts = rng.integers(0, len(self._stream) - c.text_length, c.text_rows)
        tokens = self._stream[starts[:, None] + np.arange(c.text_length)]
        full: Any = np.ones(tokens.shape, bool)
        return Batch(tokens.astype(np.int32), full, full)

    def _needle_batch(self, rng: np.random.Generator, length: int, step: int) -> Batch:
        rows = self.config.needle_tokens // length
        tokens: Any = np.full((rows, length), self._tokenizer.pad_id, np.int32)
        maskable: Any = np.zeros((rows, length), bool)
        valid: Any = np.zeros((rows, length), bool)
        for i in range(rows):
            task = self._tasks[length][rng.integers(len(self._tasks[length]))]
            row = self._needle_row(task, step * rows + i)
            end = len(row.tokens) + rng.integers(MOST_EXTRA_EOS + 1)
            tokens[i, :end] = self._tokenizer.eos_id
            tokens[i, : len(row.tokens)] = row.tokens
            valid[i, :end] = True
            maskable[i, row.prompt_length : end] = True
        return Batch(tokens, maskable, valid)

    def _needle_row(self, task: NeedleTask, index: int) -> Row:
        episode = task.episode(self.config.seed, index)
        row = self._encoder.encode(episode.example("needles"))
        if isinstance(row, str):
            raise ValueError(f"a needle row of length={task.config.length} was dropped: {row}")
        slots = len(row.tokens) - row.prompt_length + MOST_EXTRA_EOS
        if slots > ANSWER_SLOTS:
            raise ValueError(f"a needle answer needs {slots} target slots of {ANSWER_SLOTS}")
        return row


def _tasks(
    length: int, max_keys: int, tokenizer: Tokenizer, filler: Filler, split: Split
) -> list[NeedleTask]:
    """Every combination of keys, words and wording that fits the length."""
    choices = itertools.product(range(1, max_keys + 1), (1, 2), get_args(Template))
    tasks, problem = [], ""
    for keys, words, template in choices:
        row = length - MOST_EXTRA_EOS
        config = NeedleConfig(row, keys, key_words=words, template=template, split=split)
        try:
            tasks.append(NeedleTask(config, tokenizer, filler))
        except ValueError as error:
            problem = str(error)
    if not tasks:
        raise ValueError(f"needle_lengths holds {length}, too short for any task: {problem}")
    return tasks


def tokenizer_text(source: SourceConfig, episodes: int = 2000, seed: int = 0) -> Iterator[str]:
    """Text to train a tokenizer on: the training corpus, then needle prompts in their wording.

    Raises:
        ImportError: the corpus package is not installed.
    """
    for document in source.corpus.documents(source, "train"):
        yield "\n".join(text for _, text in document)
    yield from wording(episodes, seed)


def text_stream(source: SourceConfig, tokenizer: Tokenizer, split: Split) -> np.ndarray:
    """All text of a split as one row of ids, conversations in the turn format of fine-tuning.

    Returns:
        [n] int32.
    """
    ids: list[int] = []
    with Progress(f"encoding the {split} text", unit="document") as bar:
        for document in source.corpus.documents(source, split):
            encoded = tokenizer.encode_batch([text for _, text in document])
            for (role, _), text in zip(document, encoded, strict=True):
                if role != "text":
                    is_assistant = role == "assistant"
                    ids.append(tokenizer.assistant_id if is_assistant else tokenizer.user_id)
                ids.extend([*text, tokenizer.eos_id])
            bar.update()
    return np.asarray(ids, np.int32)

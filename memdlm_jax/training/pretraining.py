"""Pretraining of a small denoiser that retrieves: what it reads, how it starts, what it shows."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from memdlm_jax import storage
from memdlm_jax.data.corpora import SourceConfig
from memdlm_jax.data.pretraining import (
    ANSWER_SLOTS,
    PretrainingConfig,
    PretrainingMix,
    text_stream,
    tokenizer_text,
)
from memdlm_jax.data.tokenizer import Tokenizer, train_tokenizer
from memdlm_jax.diffusion import masking
from memdlm_jax.diffusion.schedule import Schedule
from memdlm_jax.typing import Batch, Key


@dataclasses.dataclass(frozen=True)
class AnswersWhole:
    """The pretraining corruption: needle answers are masked whole, text by the schedule.

    A needle row is known by its few maskable tokens (at most ``ANSWER_SLOTS``). With the answer
    masked whole and the context clean, every target asks for retrieval.

    Attributes:
        schedule: of the text.
    """

    schedule: Schedule

    def __call__(self, key: Key, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Draw (mask [b, l] bool, loss weight [b])."""
        time_key, mask_key = jax.random.split(key)
        t = self.schedule.sample_times(time_key, batch.tokens.shape[0])
        t = jnp.where(batch.maskable.sum(-1) <= ANSWER_SLOTS, 1.0, t)
        ratio = self.schedule.mask_ratio(t)
        return masking.bernoulli_mask(mask_key, batch.maskable, ratio), self.schedule.weight(t)


def tokenizer_at(path: str | Path, vocab_size: int, source: SourceConfig) -> Tokenizer:
    """Load the tokenizer at ``path``, or train one on the corpus and store it there."""
    if storage.path(path).exists():
        return Tokenizer.load(path)
    tokenizer = train_tokenizer(tokenizer_text(source), vocab_size)
    tokenizer.save(path)
    return tokenizer


@dataclasses.dataclass(frozen=True)
class PretrainingData:
    """What a run reads.

    Attributes:
        train: mixture of the training steps.
        validation: batches.
        held_out_sentences: haystack sentences for the probe.
        identity: dotted name -> what a resumed run must read too.
    """

    train: PretrainingMix
    validation: list[Batch]
    held_out_sentences: list[str]
    identity: dict[str, str]


def load_data(config: PretrainingConfig, tokenizer: Tokenizer, validation: int) -> PretrainingData:
    """Read the corpus; ``validation`` batches come from conversations and key words of their own.

    Raises:
        ImportError: if the corpus packages are not installed.
    """
    source, corpus = config.source, config.source.corpus
    stream = text_stream(source, tokenizer, "train")
    sentences, held_out = (corpus.sentences(source, split) for split in ("train", "validation"))
    train = PretrainingMix(config, tokenizer, stream, sentences, "train")
    steady = PretrainingMix(
        dataclasses.replace(config, needle_only_batches=0), tokenizer,
        text_stream(source, tokenizer, "validation"), held_out, "validation",
    )  # fmt: skip
    batches = [steady.batch_at(step) for step in range(validation)]
    return PretrainingData(train, batches, held_out, digest(stream, sentences, tokenizer))


def digest(stream: np.ndarray, sentences: Sequence[str], tokenizer: Tokenizer) -> dict[str, str]:
    """What identifies the training data to a resumed run: tokenizer, running text, haystacks."""
    return {
        "data.tokenizer": tokenizer.digest(),
        "data.text": hashlib.sha256(np.ascontiguousarray(stream).tobytes()).hexdigest(),
        "data.sentences": hashlib.sha256("\n".join(sentences).encode()).hexdigest(),
    }

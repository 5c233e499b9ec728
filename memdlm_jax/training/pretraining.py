"""Pretraining of a small denoiser that retrieves: what it reads, how it starts, what it shows."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from memdlm_jax.data import sources
from memdlm_jax.data.pretraining import (
    ANSWER_SLOTS,
    PretrainingConfig,
    PretrainingMix,
    text_stream,
    tokenizer_text,
)
from memdlm_jax.data.tokenizer import Tokenizer, train_tokenizer
from memdlm_jax.diffusion import masking
from memdlm_jax.diffusion.schedule import LinearSchedule, loss_weight
from memdlm_jax.typing import Batch, Key

logger = logging.getLogger(__name__)


def corrupt(schedule: LinearSchedule) -> Callable[[Key, Batch], tuple[jax.Array, jax.Array]]:
    """The pretraining corruption: needle answers are masked whole, text by the schedule.

    A needle row is known by its few maskable tokens (at most ``ANSWER_SLOTS``). With the answer
    masked whole and the context clean, every target asks for retrieval.

    Returns:
        (key, batch) -> (mask [b, l] bool, loss weight [b]).
    """

    def draw(key: Key, batch: Batch):
        time_key, mask_key = jax.random.split(key)
        t = schedule.sample_times(time_key, batch.tokens.shape[0])
        t = jnp.where(batch.maskable.sum(-1) <= ANSWER_SLOTS, 1.0, t)
        return masking.bernoulli_mask(mask_key, batch.maskable, t), loss_weight(t)

    return draw


def tokenizer_at(path: str | Path, vocab_size: int) -> Tokenizer:
    """Load the tokenizer at ``path``, or train one on the corpus and store it there."""
    if Path(path).exists():
        return Tokenizer.load(path)
    logger.info("training a tokenizer of %d entries", vocab_size)
    tokenizer = train_tokenizer(tokenizer_text(), vocab_size)
    tokenizer.save(path)
    return tokenizer


@dataclasses.dataclass(frozen=True)
class PretrainingData:
    """Training mixture, validation batches, and haystack sentences held out for the probe."""

    train: PretrainingMix
    validation: list[Batch]
    held_out_sentences: list[str]


def load_data(config: PretrainingConfig, tokenizer: Tokenizer, validation: int) -> PretrainingData:
    """Read the corpus; ``validation`` batches come from conversations and key words of their own.

    Raises:
        ImportError: if the corpus packages are not installed.
    """

    def mix(config: PretrainingConfig, split, sentences: Sequence[str]) -> PretrainingMix:
        return PretrainingMix(config, tokenizer, text_stream(tokenizer, split), sentences, split)

    held_out = sources.chitchat_sentences("validation")
    steady = dataclasses.replace(config, needle_only_batches=0)
    batches = mix(steady, "validation", held_out)
    return PretrainingData(
        mix(config, "train", sources.chitchat_sentences("train")),
        [batches.batch_at(step) for step in range(validation)],
        held_out,
    )


def digest(stream: np.ndarray, tokenizer: Tokenizer) -> Mapping[str, str]:
    """What identifies the data to a resumed run."""
    return {"data.tokenizer": tokenizer.digest(), "data.tokens": str(len(stream))}

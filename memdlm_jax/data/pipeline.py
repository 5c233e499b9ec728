"""Rows to batches with Grain: length buckets, and a data position that is one integer.

The batch of a step is a pure function of (rows, configuration, step). Nothing else is kept, so a
run goes on at any step, on any number of threads and processes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from jaxtyping import Int

from memdlm_jax.data.buckets import check_buckets, fewest_buckets, padding_share
from memdlm_jax.data.prepare import PreparedData
from memdlm_jax.data.sft import Row
from memdlm_jax.data.text import SPLITS, Split, check_at_least
from memdlm_jax.typing import Batch

_FILL = -1
_SLOT_MULTIPLE = 8
_ENDLESS = 1 << 40


class Rows(Protocol):
    """Random access to rows, several at once."""

    def take(self, indices: Sequence[int]) -> list[Row]:
        """The rows of these indices, in this order."""
        ...


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How rows become batches.

    Attributes:
        buckets: lengths of batches, ascending; a row goes to the shortest that holds it. Empty
            takes the fewest that keep to ``max_padding``, see ``resolved``.
        max_padding: chosen buckets have at most this share of padding, in [0, 1).
        max_buckets: most buckets to choose; each costs a compilation.
        bucket_multiple: chosen buckets but the last are multiples of this.
        rows_per_batch: rows of a batch, over all processes.
        seed: of the order of rows and batches.
        supervise_padding: fill the response up with end-of-sequence tokens that are attended to
            and carry loss, as the public code does. Otherwise padding does neither.
        num_threads: threads that read ahead in ``Pipeline.iterate``.
        prefetch: batches read ahead there; the training loop reads two ahead.
    """

    buckets: tuple[int, ...] = ()
    max_padding: float = 0.08
    max_buckets: int = 16
    bucket_multiple: int = 8
    rows_per_batch: int = 32
    seed: int = 0
    supervise_padding: bool = False
    num_threads: int = 2
    prefetch: int = 8

    def __post_init__(self):
        counts = "max_buckets", "bucket_multiple", "rows_per_batch"
        for name in (*counts, "num_threads", "prefetch"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("seed", self.seed, 0)
        if self.buckets:
            check_buckets(self.buckets)
        if not 0 <= self.max_padding < 1:
            raise ValueError(f"max_padding={self.max_padding} must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class BatchRows:
    """Which rows make the batch of a step.

    Attributes:
        length: length of the batch, one of the buckets.
        rows: [rows_per_batch] indices; -1 is a row of padding.
    """

    length: int
    rows: Int[np.ndarray, "b"]


class BatchPlan:
    """Which rows each step takes: every row once an epoch, in an order drawn for the epoch."""

    def __init__(
        self,
        lengths: Int[np.ndarray, "rows"],
        buckets: tuple[int, ...],
        rows_per_batch: int,
        seed: int = 0,
    ):
        """Sort rows into buckets.

        Args:
            lengths: [rows] ids of each row.
            buckets: lengths of batches, ascending.
            rows_per_batch: rows of a batch.
            seed: at least 0.

        Raises:
            ValueError: there are no rows, or one is longer than the last bucket.
        """
        check_at_least("rows_per_batch", rows_per_batch, 1)
        check_at_least("seed", seed, 0)
        check_buckets(buckets)
        if not len(lengths):
            raise ValueError("lengths is empty: there is no row to plan a batch of")
        if lengths.max() > buckets[-1]:
            raise ValueError(
                f"buckets={buckets} must end at {lengths.max()} or more, the longest row"
            )
        self.buckets, self.rows_per_batch, self.seed = buckets, rows_per_batch, seed
        self.bucket_of_row = np.searchsorted(buckets, lengths)
        counts = np.bincount(self.bucket_of_row, minlength=len(buckets))
        self.batches_per_bucket = tuple(int(n) for n in -(-counts // rows_per_batch))
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in which every row comes once; the same for each epoch."""
        return sum(self.batches_per_bucket)

    @property
    def fill_rows(self) -> int:
        """Rows of padding in an epoch, which complete the last batch of each bucket."""
        return self.steps_per_epoch * self.rows_per_batch - len(self.bucket_of_row)

    def at(self, step: int) -> BatchRows:
        """The rows of step ``step``, at least 0; epochs follow each other without end."""
        check_at_least("step", step, 0)
        epoch, place = divmod(step, self.steps_per_epoch)
        buckets, rows = self._epoch(epoch)
        return BatchRows(self.buckets[buckets[place]], rows[place])

    def _draw_epoch(
        self, epoch: int
    ) -> tuple[Int[np.ndarray, "steps"], Int[np.ndarray, "steps b"]]:
        """(bucket, rows) of each batch of an epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        rows = []
        for bucket, batches in enumerate(self.batches_per_bucket):
            drawn = rng.permutation(np.flatnonzero(self.bucket_of_row == bucket))
            fill = batches * self.rows_per_batch - len(drawn)
            filled = np.pad(drawn, (0, fill), constant_values=_FILL)
            rows.append(filled.reshape(batches, self.rows_per_batch))
        order = rng.permutation(self.steps_per_epoch)
        buckets = np.repeat(np.arange(len(self.buckets)), self.batches_per_bucket)
        return buckets[order], np.concatenate(rows)[order]


class Pipeline:
    """Batches of one split."""

    def __init__(
        self,
        rows: Rows,
        lengths: tuple[Int[np.ndarray, "rows"], Int[np.ndarray, "rows"]],
        config: PipelineConfig,
        pad_id: int,
        eos_id: int,
    ):
        """Plan the batches.

        Args:
            rows: the rows.
            lengths: (ids of each row, ids of its prompt), both [rows].
            config: buckets and order.
            pad_id: fills rows.
            eos_id: fills responses when padding is supervised.

        Raises:
            ValueError: there are no rows, no buckets, or a row is longer than the last bucket.
        """
        total, prompt = lengths
        self.config = config
        self._lengths = total
        self.plan = BatchPlan(total, config.buckets, config.rows_per_batch, config.seed)
        self._rows, self._pad_id, self._eos_id = rows, pad_id, eos_id
        end = np.asarray(config.buckets)[self.plan.bucket_of_row]
        self._slots = (end if config.supervise_padding else total) - prompt

    @property
    def steps_per_epoch(self) -> int:
        """Batches in which every row comes once."""
        return self.plan.steps_per_epoch

    @property
    def padding(self) -> float:
        """Share of an epoch's positions that hold no token of a row, in [0, 1)."""
        return padding_share(self._lengths, self.config.buckets, self.config.rows_per_batch)

    def describe(self) -> str:
        """The batches of an epoch for people."""
        return (
            f"{self.steps_per_epoch} steps an epoch of {self.config.rows_per_batch} rows, "
            f"{len(self.config.buckets)} lengths {self.config.buckets}, {self.padding:.1%} padding"
        )

    def target_capacity(self, length: int) -> int:
        """Most maskable positions of any row in batches of ``length``.

        Rounded up to a multiple of 8, at most ``length``; the same on all processes, for all
        epochs: the static number of target slots of a compiled loss.

        Raises:
            ValueError: ``length`` is no bucket.
        """
        if length not in self.config.buckets:
            raise ValueError(f"length={length} must be one of buckets={self.config.buckets}")
        bucket = self.config.buckets.index(length)
        most = int(self._slots[self.plan.bucket_of_row == bucket].max(initial=1))
        return min(length, -(-most // _SLOT_MULTIPLE) * _SLOT_MULTIPLE)

    def batch_at(self, step: int) -> Batch:
        """The batch of ``step``: numpy arrays [b, l].

        Raises:
            ValueError: ``step`` is negative.
        """
        return self.part_at(step, np.arange)

    def part_at(self, step: int, choose: Callable[[int], Int[np.ndarray, "r"]]) -> Batch:
        """Some rows of the batch of ``step``, numpy arrays [r, l]; no other row is read.

        Args:
            step: at least 0.
            choose: rows of a batch -> which of them, in their order; those of one process.

        Raises:
            ValueError: ``step`` is negative.
        """
        planned = self.plan.at(step)
        mine = planned.rows[choose(self.config.rows_per_batch)]
        shape = (len(mine), planned.length)
        tokens: Any = np.full(shape, self._pad_id, np.int32)
        maskable: Any = np.zeros(shape, bool)
        valid: Any = np.zeros(shape, bool)
        padding: Any = np.zeros(shape, bool) if self.config.supervise_padding else None
        places = np.flatnonzero(mine != _FILL)
        for place, row in zip(places, self._rows.take(mine[places].tolist()), strict=True):
            end = len(row.tokens)
            tokens[place, :end] = row.tokens
            if self.config.supervise_padding:
                tokens[place, end:] = self._eos_id
                padding[place, end:] = True
                end = planned.length
            maskable[place, row.prompt_length : end] = True
            valid[place, :end] = True
        return Batch(tokens=tokens, maskable=maskable, valid=valid, padding=padding)

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches of ``start_step``, ``start_step + 1``, ... without end, read ahead in threads.

        Raises:
            ValueError: ``start_step`` is negative.
        """
        check_at_least("start_step", start_step, 0)
        options = grain.ReadOptions(
            num_threads=self.config.num_threads, prefetch_buffer_size=self.config.prefetch
        )
        steps = grain.MapDataset.range(start_step, _ENDLESS)
        return iter(steps.map(self.batch_at).to_iter_dataset(options))


def resolved(config: PipelineConfig, prepared: PreparedData) -> PipelineConfig:
    """The configuration with its buckets chosen, if it names none.

    They are the fewest that keep the padding of the training split at ``max_padding`` or below,
    and hold the rows of all splits: the same for each split, step and process.
    """
    if config.buckets:
        return config
    longest = max(
        int(prepared.lengths(split)[0].max())
        for split in SPLITS
        if prepared.summary["splits"][split]["rows"]
    )
    # A row is never longer than this, and a model may have no more positions.
    most = prepared.summary["config"]["encode"]["max_length"]
    last = min(-(-longest // config.bucket_multiple) * config.bucket_multiple, most)
    buckets = fewest_buckets(
        prepared.lengths("train")[0], last, config.rows_per_batch,
        config.max_buckets, config.bucket_multiple, config.max_padding,
    )  # fmt: skip
    return dataclasses.replace(config, buckets=buckets)


def make_pipeline(prepared: PreparedData, split: Split, config: PipelineConfig) -> Pipeline:
    """The batches of a split of prepared data; ``resolved`` chooses buckets where none are named.

    Raises:
        ValueError: the split has no rows, or one is longer than the last bucket.
    """
    tokenizer, config = prepared.tokenizer, resolved(config, prepared)
    return Pipeline(
        prepared.rows(split), prepared.lengths(split), config, tokenizer.pad_id, tokenizer.eos_id
    )

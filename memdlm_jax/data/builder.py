"""Encoded rows as ArrayRecord files, written and read through TFDS without TensorFlow."""

import collections
import contextlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from memdlm_jax.data.example import Example
from memdlm_jax.data.sft import Encoder, Row
from memdlm_jax.data.text import SPLITS, Split
from memdlm_jax.progress import Progress

_READ_AT_ONCE = 1024
_PERCENTILES = (5, 25, 50, 75, 95, 100)

Sources = Mapping[Split, Callable[[], Iterable[Example]]]


class MemdlmRows(tfds.core.GeneratorBasedBuilder):
    """Rows of ids: ``tokens`` [n] int32, ``prompt_length``, ``source`` and ``group``."""

    VERSION = tfds.core.Version("1.0.0")
    # TFDS looks beside this file for checksums of downloads, with a package that it does not
    # install. There are no downloads.
    code_path = None

    def __init__(self, streams: Mapping[str, Iterable[dict[str, Any]]] | None = None, **kwargs):
        """Keep the rows to write, by split; ``None`` only reads what is there."""
        self._streams = streams or {}
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
                    "prompt_length": np.int32,
                    "source": tfds.features.Text(),
                    "group": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # Nothing is downloaded.
        return {split: self._generate_examples(rows) for split, rows in self._streams.items()}

    def _generate_examples(self, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict]]:
        yield from enumerate(rows)


class RowReader:
    """Random access to the rows of one split."""

    def __init__(self, directory: str | Path, split: Split):
        """Open the files.

        Args:
            directory: what ``write_rows`` was given.
            split: a split that has rows.

        Raises:
            ValueError: the split has no rows.
        """
        builder = MemdlmRows(data_dir=str(directory))
        if split not in builder.info.splits:
            raise ValueError(
                f"split={split!r} has no rows in {directory}, only {sorted(builder.info.splits)} do"
            )
        self._source = builder.as_data_source(split)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._source)

    def __getitem__(self, index: int) -> Row:
        """Row ``index``, in [0, len); any other raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"index={index} must lie in [0, {len(self)})")
        return self.take([index])[0]

    def take(self, indices: Sequence[int]) -> list[Row]:
        """Several rows at once, which is faster than one by one; each index in [0, len)."""
        found = self._source.__getitems__([int(i) for i in indices])
        return [Row(row["tokens"], int(row["prompt_length"])) for row in found]

    def lengths(self) -> tuple[Int[np.ndarray, "rows"], Int[np.ndarray, "rows"]]:
        """(ids of each row, ids of its prompt), both [rows] int32; reads everything once."""
        starts = range(0, len(self), _READ_AT_ONCE)
        pairs: list[tuple[int, int]] = []
        with Progress("reading lengths", len(self), "row", brief=True) as bar:
            for start in starts:
                chunk = self.take(range(start, min(start + _READ_AT_ONCE, len(self))))
                pairs += [(len(row.tokens), row.prompt_length) for row in chunk]
                bar.update(len(chunk))
        total, prompt = np.asarray(pairs, np.int32).reshape(-1, 2).T
        return total, prompt


def write_rows(directory: str | Path, sources: Sources, encoder: Encoder) -> dict[str, Any]:
    """Encode examples and write them as ArrayRecord files under ``directory``.

    Rows are stored in an order that depends on their number alone, so that the same examples give
    the same files.

    Args:
        directory: a folder without rows.
        sources: for each split a function that gives its examples.
        encoder: makes rows of them.

    Returns:
        A summary, ready for JSON: for each split rows, tokens, response tokens, percentiles of the
        lengths, rows by source, and the dropped examples by reason.

    Raises:
        ValueError: the training split has no row.
    """
    counters = {split: _Counter() for split in SPLITS}
    streams: dict[str, Iterable[dict[str, Any]]] = {}
    with Progress("preparing data", unit="row") as bar:
        for split in SPLITS:
            rows = _rows(sources[split](), encoder, counters[split], bar)
            if (first := next(rows, None)) is not None:
                streams[split] = itertools.chain([first], rows)
            elif split == "train":
                raise ValueError(
                    "the training split has no row: "
                    f"{dict(counters[split].dropped) or 'the sources gave no example'}; "
                    f"max_length={encoder.config.max_length}"
                )
        tfds.disable_progress_bar()
        # TFDS prints that it downloads data of unknown size, but nothing is downloaded.
        with contextlib.redirect_stdout(io.StringIO()):
            MemdlmRows(streams, data_dir=str(directory)).download_and_prepare()
    return {split: counter.summary() for split, counter in counters.items()}


class _Counter:
    """What went by while rows were encoded."""

    def __init__(self) -> None:
        self.sources: collections.Counter[str] = collections.Counter()
        self.dropped: collections.Counter[str] = collections.Counter()
        self.lengths: list[int] = []
        self.responses: list[int] = []

    def add(self, row: Row, source: str) -> None:
        self.sources[source] += 1
        self.lengths.append(len(row.tokens))
        self.responses.append(len(row.tokens) - row.prompt_length)

    def summary(self) -> dict[str, Any]:
        return {
            "rows": len(self.lengths),
            "tokens": sum(self.lengths),
            "response_tokens": sum(self.responses),
            "length_percentiles": _percentiles(self.lengths),
            "response_length_percentiles": _percentiles(self.responses),
            "rows_by_source": dict(self.sources),
            "dropped": dict(self.dropped),
        }


def _percentiles(values: list[int]) -> dict[str, int]:
    """Percentiles that are values themselves; empty for no values."""
    if not values:
        return {}
    found = np.percentile(values, _PERCENTILES, method="lower")
    return {f"p{p}": int(value) for p, value in zip(_PERCENTILES, found, strict=True)}


def _rows(
    examples: Iterable[Example], encoder: Encoder, counter: _Counter, bar: Progress
) -> Iterator[dict[str, Any]]:
    """Encode examples; dropped ones are only counted."""
    for example in examples:
        row = encoder.encode(example)
        if isinstance(row, str):
            counter.dropped[f"{example.source}: {row}"] += 1
            continue
        counter.add(row, example.source)
        bar.update()
        yield {
            "tokens": row.tokens,
            "prompt_length": row.prompt_length,
            "source": example.source,
            "group": example.group,
        }

"""From a configuration to rows on disk: ``prepare`` writes them once and finds them again."""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from memdlm_jax import storage
from memdlm_jax.data.builder import RowReader, write_rows
from memdlm_jax.data.corpora import SourceConfig
from memdlm_jax.data.example import Example
from memdlm_jax.data.sft import EncodeConfig, Encoder
from memdlm_jax.data.text import SPLITS, Split, check_at_least
from memdlm_jax.data.tokenizer import Tokenizer, train_tokenizer

_FORMAT = 1
"""Goes up when the same configuration gives other rows, so that old files are not reused."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What rows are made of.

    Attributes:
        directory: where tokenizers and rows are kept; safe to share between configurations.
        sources: mixed by taking the rows of all of them.
        encode: the longest row, and what happens to longer examples.
        tokenizer: path of a ``tokenizer.json``; empty trains one on the training split.
        tokenizer_digest: refuses any other tokenizer; empty accepts all.
        vocab_size: of a tokenizer trained here.
        seed: of the needle episodes.
    """

    directory: str
    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    encode: EncodeConfig = dataclasses.field(default_factory=EncodeConfig)
    tokenizer: str = ""
    tokenizer_digest: str = ""
    vocab_size: int = 4096
    seed: int = 0

    def __post_init__(self):
        if not self.directory:
            raise ValueError("directory='' must name a folder")
        if not self.sources:
            raise ValueError("sources=() must name at least one source")
        check_at_least("vocab_size", self.vocab_size, 1)
        check_at_least("seed", self.seed, 0)
        for source in self.sources:
            if source.needles and source.needles.length > self.encode.max_length:
                raise ValueError(
                    f"needles.length={source.needles.length} must be at most "
                    f"encode.max_length={self.encode.max_length}"
                )


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Rows on disk and the tokenizer that made them.

    Attributes:
        directory: holds the rows, ``tokenizer.json`` and ``summary.json``.
        tokenizer: the tokenizer of the rows.
        summary: the content of ``summary.json``: see ``builder.write_rows``, for each split.
    """

    directory: Path
    tokenizer: Tokenizer
    summary: dict[str, Any]

    def rows(self, split: Split) -> RowReader:
        """Random access to the rows of a split.

        Raises:
            ValueError: the split has no rows.
        """
        return RowReader(self.directory, split)

    def lengths(self, split: Split) -> tuple[Int[np.ndarray, "rows"], Int[np.ndarray, "rows"]]:
        """(ids of each row, ids of its prompt), both [rows] int32, in the order of ``rows``."""
        self.rows(split)
        with np.load(self.directory / f"lengths-{split}.npz") as stored:
            return stored["total"], stored["prompt"]

    def describe(self) -> str:
        """The summary for people, one line for each split and reason."""
        lines = [f"{self.directory} (tokenizer {self.tokenizer.digest()[:12]})"]
        for split in SPLITS:
            found = self.summary["splits"][split]
            lines.append(
                f"{split}: {found['rows']} rows, {found['tokens']} tokens, "
                f"{found['response_tokens']} of them response, "
                f"lengths {found['length_percentiles']}"
            )
            lines += [f"  dropped {n}: {reason}" for reason, n in found["dropped"].items()]
        return "\n".join(lines)


def prepare(config: DataConfig) -> PreparedData:
    """Write the rows of a configuration, or find them if they are there already.

    Rows live in a folder named after a digest of everything that shapes them (sources and their
    content, encoding, tokenizer, seed), so another setting never reads them. The folder appears
    only when it is complete.

    Raises:
        ValueError: a wrong tokenizer, bad input, or no row at all.
        FileNotFoundError: a file of the configuration is not there.
        ImportError: a corpus package is not installed.
    """
    prints = [source.corpus.fingerprint(source) for source in config.sources]
    tokenizer = _tokenizer(config, prints)
    content = [dataclasses.asdict(config.encode), tokenizer.digest(), config.seed, prints]
    final = storage.path(config.directory) / f"rows-{_digest(content)}"
    if storage.is_remote(final):
        _prepare_in_bucket(config, tokenizer, final)
    elif not final.exists():
        unfinished = final.with_name(f".{final.name}-{os.getpid()}")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            _write(config, tokenizer, unfinished)
            _publish(unfinished, final)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return load_prepared(final, config.tokenizer_digest)


def _prepare_in_bucket(config: DataConfig, tokenizer: Tokenizer, final: Path) -> None:
    """Write rows on a disk and copy them, the summary last: rows with it are complete."""
    if (final / "summary.json").exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        _write(config, tokenizer, Path(folder) / final.name)
        storage.copy_folder(Path(folder) / final.name, final, last="summary.json")


def load_prepared(directory: str | Path, tokenizer_digest: str = "") -> PreparedData:
    """Open rows that ``prepare`` has written.

    Args:
        directory: ``PreparedData.directory``; in a bucket it is copied to a temporary folder of
            this process, since rows are read at random.
        tokenizer_digest: what the tokenizer's digest has to be; empty accepts any.

    Raises:
        FileNotFoundError: there are no rows.
        ValueError: the tokenizer is not the one that made the rows, or not the one asked for.
    """
    directory = storage.path(directory)
    if not (directory / "summary.json").is_file():
        raise FileNotFoundError(f"no prepared data in {directory}")
    directory = storage.fetched(directory)
    summary = json.loads((directory / "summary.json").read_text())
    if tokenizer_digest not in ("", summary["tokenizer_digest"]):
        raise ValueError(
            f"tokenizer_digest={tokenizer_digest} was asked for, but the rows in {directory} were "
            f"made with {summary['tokenizer_digest']}"
        )
    tokenizer = Tokenizer.load(directory / "tokenizer.json", digest=summary["tokenizer_digest"])
    return PreparedData(directory, tokenizer, summary)


def examples(config: DataConfig, split: Split, tokenizer: Tokenizer) -> Iterator[Example]:
    """Examples of all sources of a configuration, one source after the other.

    Raises:
        ValueError: bad input; names file and field.
        FileNotFoundError: a file of the configuration is not there.
        ImportError: a corpus package is not installed.
    """
    encoder = Encoder(tokenizer, config.encode)
    for place, source in enumerate(config.sources):
        yield from source.corpus.examples(source, split, encoder, config.seed + place)


def _write(config: DataConfig, tokenizer: Tokenizer, directory: Path) -> None:
    """Write rows, lengths, tokenizer and summary."""
    streams = {split: functools.partial(examples, config, split, tokenizer) for split in SPLITS}
    found = write_rows(directory, streams, Encoder(tokenizer, config.encode))
    for split in SPLITS:
        if found[split]["rows"]:
            total, prompt = RowReader(directory, split).lengths()
            np.savez(directory / f"lengths-{split}.npz", total=total, prompt=prompt)
    tokenizer.save(directory / "tokenizer.json")
    summary = {
        "config": dataclasses.asdict(config),
        "tokenizer_digest": tokenizer.digest(),
        "vocab_size": tokenizer.vocab_size,
        "splits": found,
    }
    (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _publish(unfinished: Path, final: Path) -> None:
    """Give a finished folder its name; a neighbour that was faster has written the same."""
    try:
        unfinished.rename(final)
    except OSError:
        if not (final / "summary.json").is_file():
            raise


def _tokenizer(config: DataConfig, prints: list[Any]) -> Tokenizer:
    """The tokenizer of a configuration: given, trained before, or trained now."""
    if config.tokenizer:
        return Tokenizer.load(config.tokenizer, digest=config.tokenizer_digest)
    name = f"tokenizer-{_digest([config.vocab_size, prints])}.json"
    path = storage.path(config.directory) / name
    if not path.is_file():
        documents = (d for s in config.sources for d in s.corpus.documents(s, "train"))
        texts = (text for document in documents for _, text in document)
        trained = train_tokenizer(texts, config.vocab_size)
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.replacing(path) as unfinished:
            trained.save(unfinished)
    return Tokenizer.load(path, digest=config.tokenizer_digest)


def _digest(content: Any) -> str:
    """Short digest of anything that JSON can hold, with the format of the rows."""
    text = json.dumps([_FORMAT, content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

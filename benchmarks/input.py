"""Whether data can be the limit: the input pipeline against a training step, and its padding.

    python -m benchmarks.input [--shape=small] [--rows=FILE.jsonl] [--repeats=7] [--json=FILE]

Real conversations (or own rows) with the shipped tokenizer, batches as the default settings make
them. Three rates, in tokens of data without padding a second: *tokenise*, text to rows on disk,
which is done once; *feed*, rows on disk to batches on the device as the training loop asks for
them; and *train*, the plain MDLM step of a shape of ``benchmarks._shapes``, the fastest there is.
They take turns, each alone on the machine; ratios are of each turn.
"""

import argparse
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import _timing
from benchmarks._shapes import SHAPES, Shape
from benchmarks.step import VARIANTS, program
from memdlm_jax.data import buckets
from memdlm_jax.data.builder import write_rows
from memdlm_jax.data.corpora import SourceConfig
from memdlm_jax.data.pipeline import Pipeline, PipelineConfig, make_pipeline
from memdlm_jax.data.prepare import DataConfig, PreparedData, examples, prepare
from memdlm_jax.data.sft import EncodeConfig, Encoder
from memdlm_jax.training.feed import ahead
from memdlm_jax.training.parallel import CompiledSteps

TOKENIZER = "memdlm_jax/assets/tiny/tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Work:
    """How much each rate is taken over.

    Attributes:
        tokenised: examples of a turn.
        fed: batches of a turn.
        trained: steps of a turn.
    """

    tokenised: int = 10_000
    fed: int = 200
    trained: int = 4


WORK = Work()


class Tokenise:
    """Text to rows on disk, in a new folder every time; what was read once is not read again."""

    def __init__(self, config: DataConfig, prepared: PreparedData, count: int):
        """Read the first ``count`` training examples."""
        self._encoding, self._tokenizer = config.encode, prepared.tokenizer
        found = examples(config, "train", prepared.tokenizer)
        self._examples = list(itertools.islice(found, count))
        self.tokens = 0

    def __call__(self) -> None:
        """Write the rows and count their tokens."""
        streams: Any = {"train": lambda: self._examples, "validation": tuple, "test": tuple}
        with tempfile.TemporaryDirectory() as folder:
            found = write_rows(folder, streams, Encoder(self._tokenizer, self._encoding))
        self.tokens = found["train"]["tokens"]


class Feed:
    """Rows on disk to batches on the device, further steps every time."""

    def __init__(self, pipeline: Pipeline, shape: Shape, count: int):
        """Plan ``count`` batches a turn."""
        self._pipeline, self._count, self._next = pipeline, count, 0
        self._steps = CompiledSteps(shape.setup(None), pipeline.target_capacity)
        self.tokens = 0

    def __call__(self) -> None:
        """Have the batches come as the training loop has them, and count their tokens."""
        start, self._next, self.tokens = self._next, self._next + self._count, 0

        def made(step: int):
            return self._steps.put(self._pipeline.batch_at(step))

        for batch in ahead(made, start, self._next):
            jax.block_until_ready(batch.device)
            self.tokens += int(batch.host.valid.sum())


class Train:
    """Steps of plain MDLM on a batch without padding."""

    def __init__(self, shape: Shape, count: int):
        """Compile."""
        state, frozen = shape.state()
        arguments = state, frozen, shape.batch(), jax.random.key(1)
        self._compiled = jax.jit(program(shape, VARIANTS["mdlm"])).lower(*arguments).compile()
        self._arguments, self._count = arguments, count
        self.tokens = count * shape.rows * shape.length

    def __call__(self) -> None:
        """Take the steps, one after the other."""
        for _ in range(self._count):
            jax.block_until_ready(self._compiled(*self._arguments))


def least_padding(prepared: PreparedData, config: PipelineConfig) -> list[float]:
    """Least padding of the training split with 1 .. ``max_buckets`` lengths."""
    lengths, last = prepared.lengths("train")[0], config.buckets[-1]
    most, multiple = config.max_buckets, config.bucket_multiple
    best = buckets.best_buckets(lengths, last, config.rows_per_batch, most, multiple)
    return [buckets.padding_share(lengths, b, config.rows_per_batch) for b in best]


def measure(config: DataConfig, shape: Shape, repeats: int, work: Work) -> dict[str, Any]:
    """Rates, ratios and padding."""
    prepared = prepare(config)
    pipeline = make_pipeline(prepared, "train", PipelineConfig())
    programs = {
        "tokenise": Tokenise(config, prepared, work.tokenised),
        "feed": Feed(pipeline, shape, work.fed),
        "train": Train(shape, work.trained),
    }
    rates = per_second(programs, repeats)
    return {
        "rows": prepared.summary["splits"]["train"]["rows"],
        "tokens": prepared.summary["splits"]["train"]["tokens"],
        "rows per batch": pipeline.config.rows_per_batch,
        "buckets": pipeline.config.buckets,
        "padding": pipeline.padding,
        "least padding": least_padding(prepared, pipeline.config),
        "tokens per second": rates,
        "times the training rate": {
            name: _timing.ratios(rates[name], rates["train"]) for name in ("tokenise", "feed")
        },
    }


def per_second(programs: Mapping[str, Any], repeats: int) -> dict[str, list[float]]:
    """Tokens a second of every program, for each turn; ``program.tokens`` is of its last call."""
    counts: dict[str, list[int]] = {name: [] for name in programs}

    def counted(name: str) -> Callable[[], None]:
        def run() -> None:
            programs[name]()
            counts[name].append(programs[name].tokens)

        return run

    seconds = _timing.in_turn({name: counted(name) for name in programs}, repeats)
    return {
        name: [n / s for n, s in zip(counts[name][-repeats:], seconds[name], strict=True)]
        for name in programs
    }


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The results for people."""
    yield (
        f"{found['rows']} rows, {found['tokens']} tokens; batches of {found['rows per batch']} "
        f"rows, {len(found['buckets'])} lengths {tuple(found['buckets'])}"
    )
    yield f"  padding {found['padding']:.2%} of an epoch's positions"
    each = "  ".join(f"{n}: {share:.1%}" for n, share in enumerate(found["least padding"], 1))
    yield f"  least by number of lengths: {each}"
    for name, rates in found["tokens per second"].items():
        line = f"  {name:<10} {np.median(rates):12.0f} tokens/s"
        if ratio := found["times the training rate"].get(name):
            line += f"  {_timing.shown(ratio, 1)} x the training rate"
        yield line


def main(arguments: Sequence[str] | None = None, work: Work = WORK) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.input", description=__doc__)
    parser.add_argument("--shape", default="small", choices=list(SHAPES))
    parser.add_argument("--rows", default="", help="own JSON lines; empty: conversations")
    parser.add_argument("--max_length", type=int, default=512, help="of a row")
    parser.add_argument("--cache", default="cache/data", help="folder of the rows")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", default="", help="file for the results")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats={options.repeats} must be at least 1")
    own = SourceConfig("jsonl", options.rows) if options.rows else SourceConfig("chitchat")
    encode = EncodeConfig(options.max_length)
    config = DataConfig(options.cache, (own,), encode, tokenizer=TOKENIZER)
    found = measure(config, SHAPES[options.shape], options.repeats, work)
    print("\n".join(lines(found)), flush=True)
    _timing.write_json(options.json, {"options": vars(options), "input": found})


if __name__ == "__main__":
    main()

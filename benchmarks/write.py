"""What it costs to write a text into memory, and to ask about it when it is gone.

    python -m benchmarks.write [--model=memdlm_jax/assets/tiny] [--lengths=128,512,2048,8192]
        [--repeats=7] [--json=FILE]

For texts of each length: tokens written per second; and the time of one denoising pass over a
question with the text in memory, as a multiple of one pass over the text and the question. The
programs take turns. The tokens are random: nothing here depends on what they are. A text may be
longer than the model is meant for; the time of reading it is that of its attention all the same.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _timing
from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.memory import fast_weights, written
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.typing import EVERYTHING, Texts

SEGMENT, QUESTION = 80, 24
MEMORY = MemoryConfig(
    masking="cover", steps=6, pieces="parallel", prompt_chunk=SEGMENT, normalisation="sum",
    clip="none", adapter="full", target_modules=("down_proj",), layer_fraction=0.2,
)  # fmt: skip
"""As ``experiments.written_memory`` trains it."""


def measure(model: str, lengths: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """One row for each length: seconds and ratios of writing, asking, and reading again."""
    denoiser, theta = hugging_face.load(model)
    loop, rng = InnerLoop(denoiser, MEMORY), np.random.default_rng(0)
    split, key = loop.split, jax.random.key(0)

    def tokens(*shape):
        return rng.integers(5, denoiser.config.vocab_size, shape).astype(np.int32)

    def write(theta, texts):
        return written.write_texts(key, loop, theta, texts)[0]

    def one_pass(theta, phi, tokens):
        hidden = denoiser.trunk(theta, tokens, EVERYTHING, split=split)
        at = np.arange(tokens.shape[1])[None, -2:]
        last = fast_weights.head_with_memory(
            denoiser, theta, phi, hidden, EVERYTHING, split=split, at=at
        )
        return denoiser.readout(theta, last)

    rows = []
    for length in lengths:
        segments = -(-length // SEGMENT)
        shape = (1, segments, SEGMENT)
        valid = np.arange(segments * SEGMENT).reshape(shape) < length
        texts = Texts(tokens(*shape), jnp.asarray(valid))
        question, both = tokens(1, QUESTION), length + QUESTION
        writing, passing = jax.jit(write), jax.jit(one_pass)
        phi = writing(theta, texts)
        programs = {
            "write": functools.partial(writing, theta, texts),
            "ask": functools.partial(passing, theta, phi, question),
            "read again": functools.partial(passing, theta, None, tokens(1, both)),
        }
        seconds = _timing.in_turn(programs, repeats)
        rows.append(
            {
                "length": length,
                "seconds": seconds,
                "tokens per second": length / float(np.median(seconds["write"])),
                "ask": _timing.ratios(seconds["ask"], seconds["read again"]),
                "write": _timing.ratios(seconds["write"], seconds["read again"]),
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table."""
    print("tokens  written/s  question, ms  question / reading again  writing / reading again")
    for row in rows:
        asked = 1000 * float(np.median(row["seconds"]["ask"]))
        print(
            f"{row['length']:6d}  {row['tokens per second']:9.0f}  {asked:12.2f}  "
            f"{_timing.shown(row['ask'], 3):>24}  {_timing.shown(row['write'], 1):>23}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.write", description=__doc__)
    parser.add_argument("--model", default="memdlm_jax/assets/tiny")
    parser.add_argument("--lengths", default="128,512,2048,8192", help="tokens, by commas")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", default="", help="file for the results")
    options = parser.parse_args(arguments)
    lengths = [int(length) for length in options.lengths.split(",")]
    if options.repeats < 1 or min(lengths) < 1:
        parser.error("--repeats and all of --lengths must be at least 1")
    rows = measure(options.model, lengths, options.repeats)
    show(rows)
    _timing.write_json(options.json, {"options": vars(options), "rows": rows})


if __name__ == "__main__":
    main()

"""What thresholds, caches, batches and memory cost or save while decoding.

    python -m benchmarks.decode --model=MODEL [--json=FILE] [--questions=512] [--only=speed]

Five tables, each of ratios taken in one run. 256 tokens are generated against plain decoding, one
token a step; needle questions are asked with the same samplers; harder ones with memory, and with
memory that is written on while decoding; a prompt is written into memory; and sixteen prompts are
answered in one batch and one by one. ``--only`` takes one of them (speed, needles, adapt, memory,
batch).
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import _timing
from experiments import _memory, _model
from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.data import sources
from memdlm_jax.data.needles import NeedleConfig
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion.canvas import pad_left
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation import needles, statistics
from memdlm_jax.evaluation.needles import NeedleSuite
from memdlm_jax.evaluation.systems import System, prompt_ids
from memdlm_jax.inference import data_parallel, generation
from memdlm_jax.inference.generation import Generator, Prompts
from memdlm_jax.memory.inner_loop import inner_loop_for
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.typing import Theta

PLAIN = DecodeConfig(length=256, block_length=32, steps=0)
LEFT_TO_RIGHT = dataclasses.replace(PLAIN, attention="block_causal")


@dataclasses.dataclass(frozen=True)
class Model:
    """What is measured.

    Attributes:
        denoiser: the backbone.
        theta: its parameters.
        tokenizer: its tokenizer.
        memory: the settings that it was trained with, or the paper's.
    """

    denoiser: Transformer
    theta: Theta
    tokenizer: Tokenizer
    memory: Any

    def program(
        self, config: DecodeConfig, prompts, memory=None, devices: int = 1
    ) -> Callable[[], Any]:
        """Decoding these prompts, compiled once; rows divided over the first devices."""
        tokens, valid = prompts
        keys = jax.random.split(jax.random.key(0), len(tokens))
        generator = Generator(self.denoiser, inner_loop_for(self.denoiser, memory), config)
        on = jax.local_devices()[:devices]
        theta = data_parallel.replicate(self.theta, on)
        generate = functools.partial(data_parallel.generate, devices=on)
        return functools.partial(generate, generator, theta, Prompts(keys, tokens, valid))


def samplers(threshold: float) -> dict[str, DecodeConfig]:
    """Plain decoding, and what is to be faster."""
    change = dataclasses.replace
    return {
        "plain": PLAIN,
        "threshold": change(PLAIN, threshold=threshold),
        "prefix cache": change(PLAIN, cache="prefix"),
        "dual cache": change(PLAIN, cache="dual"),
        "threshold, dual cache": change(PLAIN, threshold=threshold, cache="dual"),
        "block-causal": LEFT_TO_RIGHT,
        "block-causal, prefix cache": change(LEFT_TO_RIGHT, cache="prefix"),
        "block-causal, threshold, prefix cache": change(
            LEFT_TO_RIGHT, threshold=threshold, cache="prefix"
        ),
    }


def questions(model: Model, count: int, length: int, seed: int = 7) -> list[list[int]]:
    """Prompts of needle questions, rows of ``length`` tokens with the answer."""
    suite = NeedleSuite(NeedleConfig(split="test"), (length,), (4,), count, seed)
    drawn = needles.draw_episodes(suite, model.tokenizer, sources.chitchat_sentences("test"))
    (episodes,) = drawn.values()
    return [prompt_ids(model.tokenizer, e.example("benchmark"), length) for e in episodes]


def talk(model: Model, count: int) -> list[list[int]]:
    """Prompts of held-out conversations."""
    chosen = [e for _, e in zip(range(count), sources.chitchat_examples("test"), strict=False)]
    length = model.denoiser.config.max_length - PLAIN.length
    return [prompt_ids(model.tokenizer, example, length)[-192:] for example in chosen]


def speed(model: Model, threshold: float, repeats: int) -> dict[str, Any]:
    """256 tokens by every sampler, two prompts of each kind one after the other."""
    found: dict[str, Any] = {}
    kinds = {"needle questions": questions(model, 2, 192), "conversations": talk(model, 2)}
    for kind, prompts in kinds.items():
        rows = [pad_left([prompt], 192, model.tokenizer.pad_id) for prompt in prompts]
        programs, decoded = {}, {}
        for name, config in samplers(threshold).items():
            calls = [model.program(config, row) for row in rows]
            programs[name] = functools.partial(lambda calls: [call() for call in calls], calls)
            decoded[name] = jax.device_get(programs[name]())
        seconds = _timing.in_turn(programs, repeats)
        found[kind] = {name: _speed_of(name, decoded, seconds) for name in programs}
        print(f"\n256 tokens, {kind}, one at a time, against plain decoding")
        for name, row in found[kind].items():
            base = "" if row["against"] == "plain" else " (of block-causal)"
            print(
                f"  {name:<38} {row['passes per token']:.3f} passes a token, "
                f"{row['of them whole']:.3f} of them whole; {row['tokens per second']:>6.0f} "
                f"tokens/s, {_timing.shown(row['speed-up'])} x; "
                f"same tokens {row['same tokens']:.1%}{base}"
            )
    return found


def _speed_of(name: str, decoded: Mapping[str, Any], seconds: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    total = sum(d.tokens.size for d in decoded[name])
    against = "block-causal" if name.startswith("block-causal") else "plain"
    pairs = zip(decoded[name], decoded[against], strict=True)
    whole, parts = (sum(int(getattr(d, k)) for d in decoded[name]) for k in ("whole", "parts"))
    return {
        "passes per token": (whole + parts) / total,
        "of them whole": whole / total,
        "tokens per second": total / float(np.median(seconds[name])),
        "speed-up": _timing.ratios(seconds["plain"], seconds[name]),
        "against": against,
        "same tokens": float(np.mean([d.tokens == p.tokens for d, p in pairs])),
        "seconds": seconds[name],
    }


def ask(model: Model, threshold: float, count: int) -> dict[str, Any]:
    """Needle answers of every sampler, paired with those of plain decoding."""
    episodes = _episodes(model, 192, 4, count)
    found: dict[str, Any] = {}
    asked = ("plain", "threshold", "dual cache", "threshold, dual cache")
    for length, block in ((8, 1), (32, 8), (256, 32)):
        print(f"\n{count} needle questions, {length} tokens in blocks of {block}, batches of 16")
        configs = {
            name: dataclasses.replace(config, length=length, block_length=block)
            for name, config in samplers(threshold).items()
            if name in asked
        }
        table = _answers(model, episodes, {name: (c, None) for name, c in configs.items()})
        found[f"{length} tokens in blocks of {block}"] = table
    return found


def adapt(model: Model, length: int, count: int) -> dict[str, Any]:
    """Needle answers without memory, with it, and with it written on while they are decoded."""
    plain = dataclasses.replace(PLAIN, length=8, block_length=1)
    written_on = dataclasses.replace(model.memory, adapt_every=1)
    systems = {
        "no memory": (plain, None),
        "memory": (plain, model.memory),
        "memory, written on after every token": (plain, written_on),
    }
    print(f"\n{count} needle questions of {length} tokens, 12 keys, 8 tokens in blocks of 1")
    return _answers(model, _episodes(model, length, 12, count), systems)


def _episodes(model: Model, length: int, keys: int, count: int) -> Sequence[Any]:
    """Needle questions on held-out keys and text."""
    suite = NeedleSuite(NeedleConfig(split="test"), (length,), (keys,), count, seed=11)
    filler = sources.chitchat_sentences("test")
    (episodes,) = needles.draw_episodes(suite, model.tokenizer, filler).values()
    return episodes


def _answers(model: Model, episodes: Sequence[Any], systems: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy of every system, and how often its answers differ from the first one's."""
    outcomes: dict[str, Any] = {}
    found: dict[str, Any] = {}
    first = next(iter(systems))
    for name, (config, memory) in systems.items():
        inner_loop = inner_loop_for(model.denoiser, memory)
        system = System(name, model.denoiser, model.theta, inner_loop)
        answer = needles.answerer(
            system, model.tokenizer, config, max_length=model.denoiser.config.max_length,
            batch_size=16,
        )  # fmt: skip
        outcomes[name] = needles.evaluate_cell(episodes, answer)
        right, other = ([o.correct for o in outcomes[k]] for k in (first, name))
        pair = statistics.paired(right, other)
        replies = zip(outcomes[first], outcomes[name], strict=True)
        said = float(np.mean([a.reply != b.reply for a, b in replies]))
        found[name] = dataclasses.asdict(pair) | {
            "accuracy": float(np.mean(other)),
            "interval": statistics.wilson_interval(sum(other), len(other)),
            "other answer": said,
            "difference": pair.difference,
            "difference interval": pair.interval,
            "p_value": pair.p_value,
        }
        low, high = pair.interval
        print(
            f"  {name:<38} {np.mean(other):6.1%} right; other answer than {first} in {said:.1%}, "
            f"right one way only {pair.only_first} / {pair.only_second}, difference "
            f"{100 * pair.difference:+.1f} points ({100 * low:+.1f} .. {100 * high:+.1f}), "
            f"p = {pair.p_value:.2g}"
        )
    return found


def memory_cost(model: Model, repeats: int) -> dict[str, Any]:
    """Writing a prompt of 256 tokens, as a share of generating 128 tokens in 128 steps."""
    config = DecodeConfig(length=128, block_length=32, steps=128)
    found = {}
    print("\nwriting a prompt of 256 tokens into memory, then 128 tokens in 128 steps")
    for rows in (1, 4):
        prompts = pad_left(questions(model, rows, 258), 256, model.tokenizer.pad_id)
        keys = jax.random.split(jax.random.key(0), rows)
        generator = Generator(model.denoiser, inner_loop_for(model.denoiser, model.memory), config)
        write = functools.partial(
            jax.jit(generation.write, static_argnums=0),
            generator, model.theta, Prompts(keys, *prompts),
        )  # fmt: skip
        programs: dict[str, Callable[[], Any]] = {
            "with memory": model.program(config, prompts, model.memory),
            "without": model.program(config, prompts),
            "writing": write,
        }
        seconds = _timing.in_turn(programs, repeats)
        share = _timing.ratios(seconds["writing"], seconds["without"])
        whole = _timing.ratios(seconds["with memory"], seconds["without"])
        found[f"{rows} rows"] = {"writing": share, "whole": whole, "seconds": seconds}
        print(
            f"  {rows:>2} rows: writing is {_timing.shown(share, 3)} of decoding without memory; "
            f"writing and decoding with memory {_timing.shown(whole, 3)} of it"
        )
    return found


def batching(model: Model, tiny: str, repeats: int) -> dict[str, Any]:
    """Sixteen prompts in one batch, on one device and divided over all, against sixteen calls.

    The smaller the work of one row, the more a batch saves: a row of the quickstart's model keeps
    two CPU cores nearly busy by itself, one of the tiny recorded models does not.
    """
    devices = jax.local_device_count()
    plain = DecodeConfig(length=64, block_length=32, steps=64)
    cached = dataclasses.replace(plain, cache="dual")
    small = dataclasses.replace(cached, block_length=8)
    denoiser, theta = hugging_face.load(tiny)
    words = np.random.default_rng(0).integers(10, 300, (16, 64)).tolist()
    golden = Model(denoiser, theta, model.tokenizer, None)
    asked = questions(model, 16, 192)
    found = {}
    print("\n16 prompts, 64 tokens in 64 steps; one batch against 16 single calls, x as fast")
    for name, of, prompts, config, memory in (
        ("plain", model, asked, plain, None),
        ("dual cache", model, asked, cached, None),
        ("dual cache, blocks of 8", model, asked, small, None),
        ("dual cache, memory", model, asked, cached, model.memory),
        ("tiny golden, plain", golden, words, plain, None),
        ("tiny golden, dual cache", golden, words, cached, None),
    ):
        width = 192 if of is model else 64
        alone = [pad_left([prompt], width, model.tokenizer.pad_id) for prompt in prompts]
        calls = [of.program(config, row, memory) for row in alone]
        together = pad_left(prompts, width, model.tokenizer.pad_id)
        programs: dict[str, Callable[[], Any]] = {
            "single": functools.partial(lambda calls: [call() for call in calls], calls),
            "on one device": of.program(config, together, memory),
        }
        if devices > 1:
            programs[f"on {devices} devices"] = of.program(config, together, memory, devices)
        seconds = _timing.in_turn(programs, repeats)
        ratios = {k: _timing.ratios(seconds["single"], seconds[k]) for k in programs}
        ratios.pop("single")
        found[name] = {"speed-up": ratios, "seconds": seconds}
        print(f"  {name:<24} " + "; ".join(f"{k} {_timing.shown(r)}" for k, r in ratios.items()))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--model", default="memdlm_jax/assets/tiny", help="model folder")
    parser.add_argument("--tiny", default="tests/golden/backbones/llada_dense")
    parser.add_argument("--json", default="", help="file for the results")
    parser.add_argument("--only", choices=("speed", "needles", "adapt", "memory", "batch"))
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--devices", type=int, default=2, help="that a CPU's cores count as")
    parser.add_argument("--threshold", type=float, default=0.9)
    options = parser.parse_args(arguments)
    for name in ("questions", "repeats", "devices"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)} must be at least 1")
    jax.config.update("jax_num_cpu_devices", options.devices)
    try:
        denoiser, theta, tokenizer = _model.load(options.model, "float32")
        model = Model(denoiser, theta, tokenizer, _memory.settings(options.model, {}))
        parts = {
            "speed": lambda: speed(model, options.threshold, options.repeats),
            "needles": lambda: ask(model, options.threshold, options.questions),
            "adapt": lambda: adapt(model, model.denoiser.config.max_length - 8, options.questions),
            "memory": lambda: memory_cost(model, options.repeats),
            "batch": lambda: batching(model, options.tiny, options.repeats),
        }
        chosen = {k: part for k, part in parts.items() if options.only in (None, k)}
        found = {name: part() for name, part in chosen.items()}
    except (OSError, ImportError, ValueError) as error:
        sys.exit(f"error: {error}")
    _timing.write_json(options.json, {"options": vars(options)} | found)


if __name__ == "__main__":
    main()

"""Describe a model: parameters, where fast weights sit, what they cost, and whether it all fits.

    python -m experiments.describe MODEL [--rows=8] [--limit-gib=80] [--base=nf4] [--lora-rank=32]
        [--rank=32] [--adapter=lora|full] [--layer-fraction=0.1] [--target-modules=mlp ...]

MODEL may be a memory that ``experiments.generate`` saved (``.safetensors``): then what it changes
is shown. Else it is a folder with a ``config.json`` (weights are not needed) or the name of a
published model: llada_8b, llada_moe_7b_a1b, llada2_0_mini, llada2_1_mini, dream_7b. Nothing is
allocated. With ``--limit-gib`` the exit status is 1 if training would not fit: parameters,
gradient, moments of AdamW and fast weights of ``--rows`` rows, one memory each, on one device;
activations come on top.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from experiments import _memory, _model
from memdlm_jax.checkpoints.trees import named
from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.models.config import runs_of
from memdlm_jax.models.lora import LoraConfig
from memdlm_jax.models.published import PUBLISHED
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.parameters import Partitioned
from memdlm_jax.training import fit
from memdlm_jax.typing import Theta


def table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Lines with columns of equal width; all but the first are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells])


def parameters(theta: Theta) -> Iterator[str]:
    """One line per array: path, shape, dtype, values, bytes."""
    rows = [("parameter", "shape", "dtype", "values", "bytes")]
    total, size = 0, 0
    for path, leaf in named(theta).items():
        count, dtype = math.prod(leaf.shape), leaf.dtype
        total, size = total + count, size + count * dtype.itemsize
        shape = "x".join(map(str, leaf.shape)) or "1"
        rows.append((path, shape, dtype.name, f"{count:,}", f"{count * dtype.itemsize:,}"))
    rows.append(("total", "", "", f"{total:,}", f"{size:,}"))
    yield from table(rows)


def active(denoiser: Transformer) -> int:
    """Parameters that one token meets: of a mixture's experts only the chosen ones."""
    theta = jax.eval_shape(denoiser.init, jax.random.key(0))
    total = sum(leaf.size for leaf in jax.tree.leaves(theta))
    parts = denoiser.config.mixture()
    if parts is None:
        return total
    layers = sum(run.length for run in runs_of(denoiser.config) if run.mixture)
    idle = parts.num_experts - parts.experts_per_token
    return total - layers * idle * 3 * denoiser.config.width * parts.features


def memory_lines(denoiser: Transformer, memory: MemoryConfig) -> Iterator[str]:
    """Where fast weights sit, and what they cost per memory.

    Raises:
        ValueError: the settings fit no matrix of the model.
    """
    split = fast_weights.split_of(denoiser, memory)
    shapes = jax.eval_shape(
        lambda key: fast_weights.init(key, denoiser, memory, groups=1), jax.random.key(0)
    )
    yield f"fast weights in layers {split} .. {denoiser.num_layers - 1}, for every memory:"
    known, rows = denoiser.adaptable(split), [("matrix", "stack", "values")]
    for path in fast_weights.adapted_paths(denoiser, memory):
        below = [leaf for name, leaf in named(shapes).items() if name.startswith(f"{path}/delta")]
        count = sum(math.prod(leaf.shape) for leaf in below)
        rows.append((path, "x".join(map(str, known[path])), f"{count:,}"))
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    rows.append(("total", "", f"{total:,}"))
    yield from table(rows)
    size = fit.bytes_per_memory(denoiser, memory)
    yield f"{size:,} bytes ({size / fit.GIB:.3f} GiB) in float32 per memory"


def describe(options: argparse.Namespace) -> tuple[list[str], fit.Need]:
    """All lines of the description, and what training needs.

    Raises:
        FileNotFoundError, ValueError: naming the field.
    """
    denoiser = _model.described(options.model)
    memory = MemoryConfig(
        rank=options.rank, adapter=options.adapter, layer_fraction=options.layer_fraction,
        target_modules=tuple(options.target_modules),
    )  # fmt: skip
    adapters = LoraConfig(rank=options.lora_rank) if options.lora_rank else None
    if adapters is None and options.base in ("int8", "nf4"):
        raise ValueError(f"--base={options.base} needs --lora-rank: codes cannot be trained")
    base = options.base or ("float32" if adapters else denoiser.config.param_dtype)
    theta = _model.shapes(denoiser, base, adapters)
    lines = [
        f"{type(denoiser).__name__} {options.model}, parameters in {base}",
        *config_lines(denoiser),
    ]
    if isinstance(theta, Partitioned):
        lines += ["", "frozen", *parameters(theta.frozen), "", "trained"]
        lines += parameters(theta.trainable)
        trained, frozen = theta.trainable, theta.frozen
    else:
        lines += ["", *parameters(theta)]
        # What is trained is float32, however the folder stores it.
        trained, frozen = _model.shapes(denoiser, "float32", None), None
    plain = jax.tree.leaves(jax.eval_shape(denoiser.init, jax.random.key(0)))
    total = sum(math.prod(leaf.shape) for leaf in plain)
    lines += [f"{total:,} parameters, {active(denoiser):,} of them met by one token", ""]
    lines += memory_lines(denoiser, memory)
    need = fit.needed(denoiser, trained, frozen, memory, options.rows)
    lines += ["", f"training with {options.rows} rows on one device: {need}; and activations"]
    return lines, need


def config_lines(denoiser: Transformer) -> Iterator[str]:
    """The model's config, field by field."""
    for name, value in dataclasses.asdict(denoiser.config).items():
        yield f"    {name} = {value!r}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    defaults: Any = MemoryConfig()
    parser = argparse.ArgumentParser(
        prog="python -m experiments.describe",
        description="Describe a model, its fast weights and what training it takes.",
    )
    parser.add_argument(
        "model", help="model folder, saved memory, or one of " + ", ".join(PUBLISHED)
    )
    parser.add_argument("--rows", type=int, default=8, help="rows of a micro-batch on a device")
    parser.add_argument("--limit-gib", type=float, help="memory of a device")
    parser.add_argument("--base", choices=("float32", "bfloat16", "int8", "nf4"))
    parser.add_argument("--lora-rank", type=int, default=0, help="train outer adapters only")
    parser.add_argument("--rank", type=int, default=defaults.rank)
    parser.add_argument("--adapter", choices=("lora", "full"), default=defaults.adapter)
    parser.add_argument("--layer-fraction", type=float, default=defaults.layer_fraction)
    parser.add_argument("--target-modules", nargs="+", default=defaults.target_modules)
    options = parser.parse_args(arguments)
    if options.rows < 1:
        parser.error(f"--rows={options.rows} must be at least 1")
    if options.limit_gib is not None and not 0 < options.limit_gib < math.inf:
        parser.error(f"--limit-gib={options.limit_gib} must be positive and finite")
    try:
        if options.model.endswith(".safetensors"):
            print("\n".join(_memory.written_lines(options.model)))
            return
        lines, need = describe(options)
        print("\n".join(lines))
        fit.require(need, options.limit_gib and int(options.limit_gib * fit.GIB))
    except (OSError, ImportError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""What a training step costs: plain MDLM, MemDLM by every meta-gradient, and the public way.

    python -m benchmarks.step --shape=B [--repeats=7] [--json=FILE] [--only="first_order;exact"]

Wall time, matrix-product FLOPs and the compiler's temporary memory of each, as multiples of the
plain MDLM step of the same run. The programs take turns; medians and extremes of the ratios are
over turns. ``--compile_only`` leaves out the times.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import _timing
from benchmarks._shapes import SHAPES, Shape
from benchmarks.naive_step import naive_step
from memdlm_jax.training import flops, step

VARIANTS: dict[str, dict[str, Any]] = {
    "mdlm": {},
    "mdlm, remat": {"remat": "full"},
    "first_order": {"memory": {}},
    "first_order, remat": {"memory": {}, "remat": "full"},
    "first_order, rank 1": {"memory": {"rank": 1, "alpha": 2.0}},
    "first_order, global": {"memory": {"scope": "global"}},
    "trunk_stopped": {"memory": {"meta_gradient": "trunk_stopped"}},
    "exact": {"memory": {"meta_gradient": "exact"}},
    "exact, remat": {"memory": {"meta_gradient": "exact"}, "remat": "full"},
    "exact, K = 8, remat": {"memory": {"meta_gradient": "exact", "steps": 8}, "remat": "full"},
    "public way": {"memory": {"scope": "global"}, "naive": True},
    "public way, remat": {"memory": {"scope": "global"}, "naive": True, "remat": "full"},
}


def program(shape: Shape, variant: dict[str, Any]):
    """(state, frozen, batch, key) -> what the step gives."""
    memory = None if "memory" not in variant else shape.memory(**variant["memory"])
    setup = shape.setup(memory, variant.get("remat", "none"))

    def ours(state, frozen, batch, key):
        return step.train_step(state, batch, key, False, setup=setup, frozen=frozen)

    def public(state, frozen, batch, key):
        return naive_step(state, batch, key, setup, frozen)

    return public if variant.get("naive") else ours


def measure(shape: Shape, names: Sequence[str], repeats: int, timed: bool = True) -> dict[str, Any]:
    """Costs of the variants, ``mdlm`` first."""
    state, frozen = shape.state()
    arguments = state, frozen, shape.batch(), jax.random.key(1)
    found: dict[str, Any] = {}
    programs = {}
    for name in names:
        function = program(shape, VARIANTS[name])
        compiled = jax.jit(function).lower(*arguments).compile()
        memory: Any = compiled.memory_analysis()
        found[name] = {
            "flops": flops.matmul_flops(function, *arguments),
            "temporary bytes": memory.temp_size_in_bytes,
        }
        programs[name] = functools.partial(compiled, *arguments)
    seconds = _timing.in_turn(programs, repeats) if timed else {}
    base = names[0]
    for name in names:
        row = found[name]
        row["flops ratio"] = row["flops"] / found[base]["flops"]
        row["memory ratio"] = row["temporary bytes"] / found[base]["temporary bytes"]
        if timed:
            row["seconds"] = seconds[name]
            row["time ratio"] = _timing.ratios(seconds[name], seconds[base])
    return found


def show(shape: str, found: dict[str, Any]) -> None:
    """Print a table."""
    print(f"\nshape {shape}: {SHAPES[shape]}")
    for name, row in found.items():
        line = (
            f"  {name:<20} {row['flops ratio']:5.2f} x FLOPs  {row['memory ratio']:5.2f} x "
            f"temporary memory ({row['temporary bytes'] / 2**20:7.1f} MiB)"
        )
        if "time ratio" in row:
            median = float(np.median(row["seconds"]))
            line += f"  {_timing.shown(row['time ratio'])} x time ({1000 * median:.0f} ms)"
        print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--shape", default="B", help=f"some of {', '.join(SHAPES)}, by commas")
    parser.add_argument(
        "--only", default="", help="variants, by semicolons; mdlm is always measured"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", default="", help="file for the results")
    parser.add_argument("--compile_only", action="store_true", help="no times")
    options = parser.parse_args(arguments)
    shapes = options.shape.split(",")
    wanted = [name.strip() for name in options.only.split(";") if name.strip()] or list(VARIANTS)
    for known, given in ((SHAPES, shapes), (VARIANTS, wanted)):
        if unknown := set(given) - set(known):
            parser.error(f"{sorted(unknown)} unknown; there are {', '.join(known)}")
    if options.repeats < 1:
        parser.error(f"--repeats={options.repeats} must be at least 1")
    names = ["mdlm", *(name for name in wanted if name != "mdlm")]
    results = {}
    for shape in shapes:
        results[shape] = measure(SHAPES[shape], names, options.repeats, not options.compile_only)
        show(shape, results[shape])
    _timing.write_json(options.json, {"options": vars(options), "shapes": results})


if __name__ == "__main__":
    main()

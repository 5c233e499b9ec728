"""How much memory a training step takes: what the compiler allots, and what the process holds.

    python -m benchmarks.memory --shape=P [--json=FILE] [--only="first_order;exact, remat"]

Every variant of ``benchmarks.step`` runs in a process of its own. ``resident`` is the most that a
process held while it took two steps, less what it held before them: parameters, optimiser state and
compiler are in both. Linux only.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import _timing
from benchmarks._shapes import SHAPES
from benchmarks.step import VARIANTS, program

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(kind: str) -> int:
    """Bytes that this process holds (``VmRSS``), or held at most since ``forget_peak`` (``VmHWM``).

    Raises:
        OSError: not on Linux.
    """
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind + ":"))


def forget_peak() -> None:
    """Let ``VmHWM`` start again from what the process holds now."""
    _CLEAR.write_text("5", encoding="utf-8")


def measure_here(shape_name: str, variant: str, steps: int = 2) -> dict[str, int]:
    """Bytes of one variant, in this process."""
    shape = SHAPES[shape_name]
    state, frozen = shape.state()
    arguments = frozen, shape.batch(), jax.random.key(1)
    function = program(shape, VARIANTS[variant])
    compiled = jax.jit(function, donate_argnums=0).lower(state, *arguments).compile()
    memory: Any = compiled.memory_analysis()
    jax.block_until_ready(state)
    forget_peak()
    before = resident("VmRSS")
    for _ in range(steps):
        state = jax.block_until_ready(compiled(state, *arguments))[0]
    held = max(resident("VmHWM") - before, 0)
    return {"temporary bytes": memory.temp_size_in_bytes, "resident bytes": held}


def measure(shape: str, variant: str) -> dict[str, int]:
    """Bytes of one variant, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", f"--shape={shape}", f"--here={variant}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--shape", default="P", choices=SHAPES)
    parser.add_argument("--only", default="", help="variants, by semicolons; mdlm is always there")
    parser.add_argument("--json", default="", help="file for the results")
    parser.add_argument("--here", default="", help="measure this variant in this process")
    options = parser.parse_args(arguments)
    asked = [name.strip() for name in options.only.split(";") if name.strip()] or list(VARIANTS)
    if unknown := set([*asked, options.here or "mdlm"]) - set(VARIANTS):
        parser.error(f"{sorted(unknown)} unknown; there are {', '.join(VARIANTS)}")
    if not _CLEAR.exists():
        parser.error("what a process holds can be read on Linux only")
    if options.here:
        print(json.dumps(measure_here(options.shape, options.here)))
        return
    names = ["mdlm", *(name for name in asked if name != "mdlm")]
    found: dict[str, Any] = {}
    print(f"shape {options.shape}: {SHAPES[options.shape]}")
    for name in names:
        row: dict[str, Any] = dict(measure(options.shape, name))
        for kind in ("temporary", "resident"):
            base = found.get("mdlm", row)[f"{kind} bytes"]
            row[f"{kind} ratio"] = row[f"{kind} bytes"] / max(base, 1)
        found[name] = row
        print(
            f"  {name:<20}"
            + "".join(
                f"  {kind} {row[f'{kind} bytes'] / 2**20:7.1f} MiB ({row[f'{kind} ratio']:.2f} x)"
                for kind in ("temporary", "resident")
            ),
            flush=True,
        )
    _timing.write_json(options.json, {"options": vars(options), "memory": {options.shape: found}})


if __name__ == "__main__":
    main()

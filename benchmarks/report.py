"""Write docs/performance.md from the JSON files of the other benchmarks.

    python -m benchmarks.report STEP.json [MEMORY.json DECODE.json ...] > docs/performance.md

Takes what the other benchmarks wrote with ``--json``; nothing in the page is written by hand.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _timing

HEAD = """# Performance
Written by `python -m benchmarks.report` from measurements; what a step costs by count stands in
[cost](cost.md), how to decode fast in [decoding](decoding.md), what a pod would take in
[pods](pods.md). Ratios are of times taken in turn in one run: median (least .. most)."""


def machine(found: Mapping[str, Any]) -> str:
    """Where a file was measured."""
    where = found["machine"]
    return f"{where['device']}, {where['cores']} cores, jax {where['jax']}"


def step_tables(found: Mapping[str, Any]) -> Iterator[str]:
    """One table for each shape of ``benchmarks.step``."""
    for shape, rows in found["shapes"].items():
        yield f"\n## Training step, shape {shape}\n{machine(found)}.\n"
        yield "| | time, mdlm = 1 | ms | FLOPs, mdlm = 1 | temporary memory, mdlm = 1 | MiB |"
        yield "|---|---|---|---|---|---|"
        for name, row in rows.items():
            time, ms = "", ""
            if "seconds" in row:
                time = _timing.shown(row["time ratio"])
                ms = f"{1000 * float(np.median(row['seconds'])):.0f}"
            yield (
                f"| {name} | {time} | {ms} | {row['flops ratio']:.2f} | "
                f"{row['memory ratio']:.2f} | {row['temporary bytes'] / 2**20:.0f} |"
            )


def memory_tables(found: Mapping[str, Any]) -> Iterator[str]:
    """One table for each shape of ``benchmarks.memory``."""
    for shape, rows in found["memory"].items():
        yield f"\n## Memory of a training step, shape {shape}\n{machine(found)}.\n"
        yield "| | allotted by the compiler | mdlm = 1 | held by the process | mdlm = 1 |"
        yield "|---|---|---|---|---|"
        for name, row in rows.items():
            columns = (
                f"{row[f'{kind} bytes'] / 2**20:.0f} MiB | {row[f'{kind} ratio']:.2f}"
                for kind in ("temporary", "resident")
            )
            yield f"| {name} | {' | '.join(columns)} |"


def decode_tables(found: Mapping[str, Any]) -> Iterator[str]:
    """Speed and batching of ``benchmarks.decode``."""
    for kind, rows in found.get("speed", {}).items():
        yield f"\n## Decoding 256 tokens, {kind}\n{machine(found)}; {found['options']['model']}.\n"
        yield "| | passes a token | of them whole | tokens/s | faster than plain | same tokens |"
        yield "|---|---|---|---|---|---|"
        for name, row in rows.items():
            yield (
                f"| {name} | {row['passes per token']:.3f} | {row['of them whole']:.3f} | "
                f"{row['tokens per second']:.0f} | {_timing.shown(row['speed-up'])} | "
                f"{row['same tokens']:.1%} |"
            )
    if batch := found.get("batch"):
        yield f"\n## Sixteen prompts in one batch against sixteen calls\n{machine(found)}.\n"
        ways = list(next(iter(batch.values()))["speed-up"])
        yield f"| | {' | '.join(ways)} |\n|{'---|' * (1 + len(ways))}"
        for name, row in batch.items():
            shown = " | ".join(_timing.shown(row["speed-up"][way]) for way in ways)
            yield f"| {name} | {shown} |"


def input_tables(found: Mapping[str, Any]) -> Iterator[str]:
    """Rates and padding of ``benchmarks.input``."""
    data, shape = found["input"], found["options"]["shape"]
    of = found["options"]["rows"] or "conversations"
    yield f"\n## Input pipeline against a training step, shape {shape}\n{machine(found)}; {of}.\n"
    yield "| | tokens/s | training step = 1 |\n|---|---|---|"
    for name, rates in data["tokens per second"].items():
        ratio = data["times the training rate"].get(name)
        shown = _timing.shown(ratio, 1) if ratio else "1"
        yield f"| {name} | {np.median(rates):,.0f} | {shown} |"
    yield (
        f"\n{data['rows']:,} rows, {data['tokens']:,} tokens, {data['rows per batch']} rows a "
        f"batch: **{data['padding']:.1%} padding** with the {len(data['buckets'])} lengths chosen, "
        f"{', '.join(map(str, data['buckets']))}. The least that a number of lengths can have:\n"
    )
    shares = data["least padding"]
    yield "| lengths | " + " | ".join(map(str, range(1, len(shares) + 1))) + " |"
    yield "|---" * (len(shares) + 1) + "|"
    yield "| padding | " + " | ".join(f"{share:.1%}" for share in shares) + " |"


def scaling_table(found: Mapping[str, Any]) -> Iterator[str]:
    """FLOPs and bytes sent of ``benchmarks.scaling``."""
    devices = list(found["scaling"])
    yield "\n## Weak scaling, compiled for simulated devices\nOf one device; two rows on each.\n"
    yield f"| mesh | | {' | '.join(devices)} devices |"
    yield "|---|---|" + "---|" * len(devices)
    for mesh in found["scaling"][devices[0]]:
        rows = [found["scaling"][count][mesh] for count in devices]
        gflops = " | ".join(f"{row['flops'] / 1e9:.3f}" for row in rows)
        sent = " | ".join(f"{row['sent'] / 2**20:.1f}" for row in rows)
        yield f"| {mesh} | GFLOPs | {gflops} |"
        yield f"| | MiB sent | {sent} |"


def tables(found: Mapping[str, Any]) -> Iterator[str]:
    """The tables of one file."""
    kinds = {
        "shapes": step_tables, "memory": memory_tables, "input": input_tables,
        "scaling": scaling_table,
    }  # fmt: skip
    return next((kind for key, kind in kinds.items() if key in found), decode_tables)(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="+", help="JSON files of the other benchmarks")
    options = parser.parse_args(arguments)
    lines = [HEAD]
    for file in options.files:
        found = json.loads(Path(file).read_text())
        if "machine" not in found:
            parser.error(f"{file} was not written by a benchmark's --json")
        lines += tables(found)
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""The table of docs/pods.md, from what ``experiments.compile_for_tpu --config.json`` wrote.

    python -m benchmarks.pods RESULT.json ...

Nothing in the table is written by hand.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from memdlm_jax.training.topology import Topology

GIB = 2**30


def program(config: Mapping[str, Any]) -> str:
    """What was compiled, in words."""
    memory = config["memory"]
    if config["program"] != "train":
        reads = "whole canvas" if config["program"] == "decode_first" else "a block, rest cached"
        return f"denoising step, {reads}"
    how = "no memory" if memory is None else f"`{memory['meta_gradient']}`"
    return f"{'LoRA' if config['lora'] else 'all parameters'}, {how}"


def rows_of(found: Mapping[str, Any]) -> int:
    """Rows of the batch."""
    config, mesh = found["config"], found["mesh"]
    shards = mesh["data"] * mesh["fsdp"] * config["optimizer"]["accumulation"]
    return config["rows"] or shards


def cells(found: Mapping[str, Any]) -> Iterator[str]:
    """One line of the table."""
    config, memory, costs = found["config"], found["memory"], found["costs"]
    topology = Topology(found["topology"])
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1)
    yield f"`{config['model']}`"
    yield program(config)
    yield f"{topology.name} ({mesh})"
    yield str(rows_of(found))
    has = f" of {topology.chip.memory / GIB:.1f}" if topology.chip else ""
    yield f"{memory['peak'] / GIB:.2f}{has}"
    yield f"{found['model_flops'] / topology.size / 1e12:.2f}"
    yield f"{costs['flops'] / 1e12:.2f}"
    yield f"{costs['bytes'] / GIB:.0f}"
    yield f"{sum(c['sent'] for c in costs['collectives']) / GIB:.2f}"
    line = found["roofline"]
    times = [] if line is None else [line["compute"], line["memory"], line["links"]]
    yield " / ".join(f"{time:.3f}" for time in times)
    yield "" if line is None else f"{line['utilisation']:.1%}"
    yield f"{found['compile_seconds']:.0f}"


def table(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """All lines, head first."""
    head = (
        "model", "program", "topology (mesh)", "rows", "GiB of a device", "model TFLOPs",
        "compiled TFLOPs", "main memory traffic, GiB", "sent, GiB",
        "seconds: compute / memory / links", "utilisation at most", "compiled in s",
    )  # fmt: skip
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for found in results:
        yield f"| {' | '.join(cells(found))} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pods", description=__doc__)
    parser.add_argument("files", nargs="+", help="JSON files of compile_for_tpu")
    results = [json.loads(Path(file).read_text()) for file in parser.parse_args(arguments).files]
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()

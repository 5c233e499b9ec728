"""What a device computes and sends as devices are added: weak scaling, by simulation.

    python -m benchmarks.scaling [--devices=8,32,256,1024] [--json=FILE] [--plot=FILE.svg]

The training step of a small MemDLM is compiled for so many simulated CPU devices, each count in a
process of its own, with as many rows for each device everywhere; nothing runs. FLOPs and
collectives of one device are counted on the compiled programs (``training.hlo``). Three ways to
divide the work: ``fsdp`` in groups of 8 that share parameters, and copies of such groups; the same
with ``tensor`` 2 inside; ``fsdp`` over all devices.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _timing
from benchmarks._shapes import Shape
from memdlm_jax.training import ahead_of_time
from memdlm_jax.training.sharding import Layout, MeshConfig
from memdlm_jax.training.topology import Topology

WIDTH = 1024
"""A width that the largest count of devices divides."""

MESHES = {
    "groups of 8": MeshConfig(data=-1, fsdp=8),
    "groups of 8, tensor 2": MeshConfig(data=-1, fsdp=4, tensor=2),
    "all share": MeshConfig(data=1, fsdp=-1),
}
ROWS_PER_DEVICE = 2


def shape_of(devices: int) -> Shape:
    """A model of two layers, one of which adapts, and a batch that grows with the devices."""
    return Shape(
        vocab_size=WIDTH, num_layers=2, rows=ROWS_PER_DEVICE * devices, length=32, response=16,
        layer_fraction=0.5, width=WIDTH, hidden_features=2 * WIDTH, num_heads=8, rank=4,
    )  # fmt: skip


def measure(devices: int) -> dict[str, Any]:
    """Compile for this process's simulated devices: mesh -> counts of one device."""
    topology, shape = Topology(f"cpu:{devices}"), shape_of(devices)
    found = {}
    for name, mesh in MESHES.items():
        layout = Layout(mesh.build(topology.devices()))
        state, _ = shape.state(shapes_only=True)
        setup = shape.setup(shape.memory())
        work = ahead_of_time.train_step(layout, setup, state, None, shape.rows, shape.length)
        report, _ = ahead_of_time.compile_for(topology, layout, work)
        costs = report.costs
        found[name] = {
            "flops": costs.flops,
            "model flops": report.model_flops / devices,
            "sent": costs.sent,
            "collectives": {
                f"{c.kind} among {c.devices}": {"times": c.times, "sent": c.sent}
                for c in costs.collectives
            },
            "peak bytes": report.memory.peak,
            "compile seconds": report.compile_seconds,
        }
    return found


def in_process(devices: int) -> dict[str, Any]:
    """``measure`` in a process that has so many simulated devices.

    Raises:
        RuntimeError: it failed, with what it said.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", f"--one={devices}"], capture_output=True,
        text=True, check=False, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"compiling for {devices} devices failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(found: Mapping[str, Mapping[str, Any]], name: str) -> float:
    """How much FLOPs of a device differ among the counts of devices: most / least - 1."""
    flops = [rows[name]["flops"] for rows in found.values()]
    return max(flops) / min(flops) - 1


def plot(found: Mapping[str, Mapping[str, Any]], path: str) -> None:
    """FLOPs and bytes sent of one device over the count of devices."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    counts = [int(devices) for devices in found]
    for name, marker in zip(MESHES, "o^s", strict=True):
        rows = [found[str(count)][name] for count in counts]
        left.plot(counts, [row["flops"] / 1e9 for row in rows], marker=marker, label=name)
        right.plot(counts, [row["sent"] / 2**20 for row in rows], marker=marker, label=name)
    for axis, title in ((left, "GFLOPs of a device"), (right, "MiB sent by a device")):
        axis.set(title=title, xlabel="devices", xscale="log")
        axis.set_ylim(0, 1.2 * max(axis.get_ylim()))
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    right.legend(frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--devices", default="8,32,256,1024", help="counts, by commas")
    parser.add_argument("--json", default="", help="file for the results")
    parser.add_argument("--plot", default="", help="file for the plot, .svg or .png")
    parser.add_argument("--one", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    try:
        counts = [int(count) for count in options.devices.split(",")]
    except ValueError:
        parser.error(f"--devices={options.devices} must be whole numbers by commas")
    if any(count < 8 or count % 8 or WIDTH % count for count in counts):
        parser.error(
            f"--devices={options.devices}: each must be a multiple of 8 and divide {WIDTH}"
        )
    found: dict[str, dict[str, Any]] = {}
    for count in counts:
        found[str(count)] = in_process(count)
        for name, row in found[str(count)].items():
            print(
                f"{count:>5} devices, {name:<22} {row['flops'] / 1e9:7.3f} GFLOPs  "
                f"{row['sent'] / 2**20:8.2f} MiB sent a device", flush=True,
            )  # fmt: skip
    for name in MESHES:
        print(f"{name}: FLOPs of a device differ by {spread(found, name):.2%}")
    if options.plot:
        plot(found, options.plot)
    _timing.write_json(options.json, {"options": vars(options), "scaling": found})


if __name__ == "__main__":
    main()

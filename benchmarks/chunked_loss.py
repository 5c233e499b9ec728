"""What the outer loss and its gradient alone take on a pod, by chunks of the vocabulary or not.

    .venv-pods/bin/python -m benchmarks.chunked_loss --topology=v5e:4x4 --fsdp=4 --tensor=4

One row of 4096 targets for each part of ``fsdp``, hidden states and unembedding of a published
model. Compiled, not run: see docs/pods.md.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from memdlm_jax import partitioning
from memdlm_jax.diffusion import objective
from memdlm_jax.diffusion.objective import Targets
from memdlm_jax.models.published import PUBLISHED
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.training import ahead_of_time
from memdlm_jax.training.ahead_of_time import Report, Work
from memdlm_jax.training.sharding import Layout, MeshConfig
from memdlm_jax.training.topology import Topology

GIB = 2**30


def compiled(topology: Topology, layout: Layout, model: Transformer, length: int) -> Report:
    """The loss of ``length`` targets of every row and its gradient, compiled and counted.

    Args:
        topology: to compile for.
        layout: a mesh of its devices.
        model: its ``vocab_chunk`` is obeyed.
        length: targets of a row.
    """
    config, rows = model.config, partitioning.row_shards(layout.mesh)

    def loss(theta, hidden, labels):
        targets = Targets(labels, labels, labels >= 0)
        return jnp.sum(objective.label_losses(model, theta, hidden, targets))

    def step(theta, hidden, labels):
        with partitioning.context(layout.mesh):
            return jax.value_and_grad(loss, (0, 1))(theta, hidden, labels)

    theta = {
        "final_norm": {"scale": jnp.ones(config.width)},
        "unembedding": jax.ShapeDtypeStruct((config.width, config.vocab_size), jnp.float32),
    }
    places = layout.shardings(theta), layout.rows

    def placed(shape: tuple[int, ...], dtype: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)

    arguments = (
        layout.abstract(theta),
        placed((rows, length, config.width), config.dtype, layout.rows),
        placed((rows, length), jnp.int32, layout.rows),
    )
    lowered = jax.jit(step, out_shardings=(layout.replicated, places)).lower(*arguments)
    products = 3 * 2 * rows * length * config.width * config.vocab_size
    return ahead_of_time.compile_for(topology, layout, Work(lowered, products, {}, 0.0))[0]


def line(chunk: int, report: Report, devices: int) -> str:
    """One line of the table; all numbers are of one device."""
    cells = (
        str(chunk or "all"),
        f"{report.model_flops / devices / 1e12:.3f}",
        f"{report.costs.flops / 1e12:.3f}",
        f"{report.memory.temporary / GIB:.2f}",
        f"{report.costs.bytes / GIB:.1f}",
        f"{report.costs.sent / GIB:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chunked_loss", description=__doc__)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--model", default="llada_moe_7b_a1b", choices=sorted(PUBLISHED))
    parser.add_argument("--fsdp", type=int, default=4)
    parser.add_argument("--tensor", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 8192])
    asked = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # Nothing runs.
    topology = Topology(asked.topology)
    mesh = MeshConfig(data=-1, fsdp=asked.fsdp, tensor=asked.tensor)
    layout = Layout(mesh.build(topology.devices()))
    head = "chunk", "model TFLOPs", "compiled", "temporary, GiB", "traffic, GiB", "sent, GiB"
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for chunk in asked.chunks:
        model = PUBLISHED[asked.model].with_config(vocab_chunk=chunk)
        print(line(chunk, compiled(topology, layout, model, asked.length), topology.size))


if __name__ == "__main__":
    main()

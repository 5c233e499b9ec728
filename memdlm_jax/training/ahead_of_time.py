"""Compile a training or decoding step for devices that are not here, and say what it would cost.

Arrays are shapes with places; nothing is allocated and nothing runs. The compiler for the devices
allots their memory, and refuses a program that does not fit.
"""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from memdlm_jax import partitioning
from memdlm_jax.inference import generation
from memdlm_jax.inference.generation import Generator, Prompts
from memdlm_jax.training import flops, hlo, parallel, step
from memdlm_jax.training.hlo import Costs
from memdlm_jax.training.sharding import LARGEST_REPLICATED, Layout
from memdlm_jax.training.state import TrainState
from memdlm_jax.training.step import StepSetup
from memdlm_jax.training.topology import Chip, Topology
from memdlm_jax.typing import Batch, Theta


class DoesNotFit(RuntimeError):
    """A program needs more memory than a device has; the message is the compiler's."""


@dataclasses.dataclass(frozen=True)
class Work:
    """A program to be compiled.

    Attributes:
        lowered: for the compiler.
        model_flops: of matrix products, on all devices together, of the plain mathematics: what
            remat computes again and what devices compute twice left out.
        replicated: path -> bytes of parameters that lie whole on every device.
        seconds: that tracing took.
    """

    lowered: Any
    model_flops: int
    replicated: dict[str, int]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        arguments: parameters, optimiser state, batch.
        temporary: the compiler's own.
        output: results that do not take an argument's place.
        peak: at once, by the compiler.
    """

    arguments: int
    temporary: int
    output: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Least seconds of a step: each resource at its published rate, all three at the same time.

    Attributes:
        compute: matrix products.
        memory: traffic with the main memory, an estimate.
        links: what is sent to other devices; on GPUs the longer of what stays within a host and
            what leaves it.
        utilisation: model FLOPs over what the devices could do in ``seconds``, in [0, 1].
    """

    compute: float
    memory: float
    links: float
    utilisation: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return max(self.compute, self.memory, self.links)

    @property
    def bound(self) -> str:
        """What the step waits for."""
        times = {"compute": self.compute, "memory": self.memory, "links": self.links}
        return max(times, key=lambda name: times[name])


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of a program.

    Attributes:
        topology: it was compiled for.
        mesh: axis -> size.
        memory: of one device.
        costs: of one device, counted on the compiled program.
        model_flops: see ``Work``.
        compiler_flops: what XLA's own analysis says of one device, loops counted once; ``None``
            where it says nothing.
        roofline: ``None`` for simulated devices.
        replicated: bytes of parameters that lie whole on every device.
        trace_seconds: of tracing.
        compile_seconds: of compiling.
    """

    topology: str
    mesh: dict[str, int]
    memory: Memory
    costs: Costs
    model_flops: int
    compiler_flops: float | None
    roofline: Roofline | None
    replicated: int
    trace_seconds: float
    compile_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = dataclasses.asdict(self)
        if self.roofline is not None:
            found["roofline"] |= {"seconds": self.roofline.seconds, "bound": self.roofline.bound}
        return found


def train_step(
    layout: Layout, setup: StepSetup, state: TrainState, frozen: Theta, rows: int, length: int
) -> Work:
    """The real training step, without the memory-off loss, lowered for a mesh.

    Args:
        layout: of the mesh.
        setup: of the step.
        state: arrays or ``jax.ShapeDtypeStruct``.
        frozen: the same, or ``None``.
        rows: of the whole batch.
        length: of its rows, in tokens.

    Raises:
        ValueError: the mesh does not fit the parameters or the batch, or a large parameter would
            lie whole on every device.
    """
    batch = _batch(layout, rows, length)
    layout.check_batch(rows, length, setup.optimizer.accumulation)
    replicated = _check_replicated(layout, {"trained": state.theta, "frozen": frozen})
    key = _placed(jax.eval_shape(lambda: jax.random.key(0)), layout.replicated)

    def bound(state, frozen, batch, key):
        return step.train_step(state, batch, key, False, setup=setup, frozen=frozen)

    def plain(state, frozen, batch, key):
        own = setup.with_denoiser(_without_remat(setup.denoiser))
        return step.train_step(state, batch, key, False, setup=own, frozen=frozen)

    start = time.monotonic()
    arguments = layout.abstract(state), layout.abstract(frozen), batch, key
    lowered = parallel.compile_ready(layout, bound, (0,), state).lower(*arguments)
    count = flops.matmul_flops(plain, *arguments)
    return Work(lowered, count, replicated, time.monotonic() - start)


def decode_step(
    layout: Layout, generator: Generator, theta: Theta, rows: int, prompt: int, first: bool
) -> Work:
    """One denoising step over a batch of prompts, lowered for a mesh; memory was written before.

    Args:
        layout: of the mesh.
        generator: model, memory and sampler.
        theta: arrays or ``jax.ShapeDtypeStruct``.
        rows: prompts in the batch.
        prompt: tokens of each.
        first: a block's first step, which reads the whole canvas (and fills the cache), or any
            other, which with a cache reads the block alone.

    Raises:
        ValueError: see ``train_step``.
    """
    replicated = _check_replicated(layout, {"theta": theta})
    if rows % (shards := partitioning.row_shards(layout.mesh)):
        raise ValueError(f"{rows} prompts must be a multiple of mesh.data * mesh.fsdp = {shards}")

    def begin(theta, keys, tokens, valid):
        return generation.start(generator, theta, Prompts(keys, tokens, valid))

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    tokens = jax.ShapeDtypeStruct((rows, prompt), jnp.int32)
    valid = jax.ShapeDtypeStruct((rows, prompt), jnp.bool_)
    start = time.monotonic()
    progress = jax.eval_shape(begin, theta, keys, tokens, valid)
    progress = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _placed(leaf, _place_of(layout, path, leaf)), progress
    )
    places = jax.tree.map(lambda leaf: leaf.sharding, progress)

    def one(theta, progress):
        loop = generation.loop_of(generator, theta, progress.canvas, progress.keys, progress.phi)
        return dataclasses.replace(progress, state=loop.step(progress.state, first))

    def on_mesh(theta, progress):
        with partitioning.context(layout.mesh):
            return one(theta, progress)

    arguments = layout.abstract(theta), progress
    lowered = jax.jit(on_mesh, donate_argnums=1, out_shardings=places).lower(*arguments)
    count = flops.matmul_flops(one, *arguments)
    return Work(lowered, count, replicated, time.monotonic() - start)


def compile_for(topology: Topology, layout: Layout, work: Work) -> tuple[Report, str]:
    """Compile, and count what came out.

    Returns:
        (report, the compiled program's HLO text).

    Raises:
        DoesNotFit: with the compiler's message, or ours where the compiler does not look.
    """
    start = time.monotonic()
    try:
        compiled = work.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
            raise DoesNotFit(str(error)) from error
        raise
    seconds = time.monotonic() - start
    memory = _memory(compiled.memory_analysis())
    chip, text = topology.chip, compiled.as_text()
    if chip is not None and memory.peak > chip.memory:
        raise DoesNotFit(
            f"the program needs {memory.peak / 2**30:.2f} GiB on a device of {topology.name} that "
            f"has {chip.memory / 2**30:.2f} GiB: {memory}"
        )
    sizes = dict(layout.mesh.shape)
    share = 1 / sizes[partitioning.EXPERT]
    costs = hlo.costs(text, layout.mesh.size, topology.devices_per_host, share)
    analysis: Any = compiled.cost_analysis() or {}
    report = Report(
        topology.name, sizes, memory, costs, work.model_flops, analysis.get("flops"),
        None if chip is None else roofline(chip, costs, work.model_flops / layout.mesh.size),
        sum(work.replicated.values()), work.seconds, seconds,
    )  # fmt: skip
    return report, text


def roofline(chip: Chip, costs: Costs, model_flops: float) -> Roofline:
    """Least time of a step on a device.

    Args:
        chip: the device.
        costs: what it does in a step.
        model_flops: its share of them.
    """
    far = sum(collective.between_hosts for collective in costs.collectives)
    links = costs.sent / chip.link_bandwidth
    if chip.host_bandwidth is not None:  # Two networks, in use at the same time.
        links = max((costs.sent - far) / chip.link_bandwidth, far / chip.host_bandwidth)
    compute, memory = costs.flops / chip.peak_flops, costs.bytes / chip.memory_bandwidth
    seconds = max(compute, memory, links)
    share = model_flops / chip.peak_flops / seconds if seconds else 0.0
    return Roofline(compute, memory, links, share)


def _memory(analysis: Any) -> Memory:
    output = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    held = analysis.argument_size_in_bytes + output
    # Some compilers report a peak of the temporaries alone, or none.
    peak = max(getattr(analysis, "peak_memory_in_bytes", 0), held + analysis.temp_size_in_bytes)
    return Memory(analysis.argument_size_in_bytes, analysis.temp_size_in_bytes, output, peak)


def _batch(layout: Layout, rows: int, length: int) -> Batch:
    def shape(kind) -> Any:
        return jax.ShapeDtypeStruct((rows, length), kind, sharding=layout.rows)

    return Batch(shape(jnp.int32), shape(jnp.bool_), shape(jnp.bool_))


def _placed(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _place_of(layout: Layout, path: Any, leaf: Any) -> Any:
    """Where a leaf of ``generation.Progress`` lies: rows divided, and heads of a cache."""
    mesh, name = layout.mesh, jax.tree_util.keystr(path, simple=True, separator="/")
    axes: list[Any] = [None] * len(leaf.shape)
    if "caches/" in name:  # [layers, b, heads, columns, d]; position ids have no heads.
        axes[1] = partitioning.ROW_AXES
        if len(axes) == 5 and leaf.shape[2] % mesh.shape[partitioning.TENSOR] == 0:
            axes[2] = partitioning.TENSOR
    elif axes:
        axes[0] = partitioning.ROW_AXES
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def _without_remat(denoiser: Any) -> Any:
    if isinstance(denoiser, parallel.Configurable):
        return denoiser.with_config(remat="none", vocab_chunk=0)
    return denoiser


def _check_replicated(layout: Layout, parameters: Any) -> dict[str, int]:
    """Bytes of what lies whole on every device; refuse large ones."""
    found = layout.replicated_bytes(parameters)
    large = {path: size for path, size in found.items() if size > LARGEST_REPLICATED}
    if large and layout.mesh.size > 1:
        worst = max(large, key=lambda path: large[path])
        raise ValueError(
            f"parameter {worst} of {large[worst] / 2**20:.0f} MB would lie whole on each of the "
            f"{layout.mesh.size} devices: make mesh.fsdp or mesh.tensor larger than 1"
        )
    return found


def _across(collective: hlo.Collective) -> str:
    if not collective.between_hosts:
        return ""
    return f" across hosts, {collective.on_host} on each"


def shown(report: Report) -> str:
    """The report in lines."""
    gib, costs = 2**30, report.costs
    devices = math.prod(report.mesh.values())
    mesh = ", ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)
    lines = [
        f"{report.topology}: {devices} devices ({mesh or 'no axis'}); traced in "
        f"{report.trace_seconds:.0f} s, compiled in {report.compile_seconds:.0f} s",
        f"memory of a device: {report.memory.peak / gib:.2f} GiB = arguments "
        f"{report.memory.arguments / gib:.2f} + temporary {report.memory.temporary / gib:.2f} + "
        f"output {report.memory.output / gib:.2f}; parameters whole everywhere: "
        f"{report.replicated / 2**20:.1f} MiB",
        f"FLOPs of a device: {costs.flops:.3e} compiled (loops multiplied out), "
        f"{report.model_flops / devices:.3e} of the model; "
        + (
            "XLA's own count: none"
            if report.compiler_flops is None
            else f"XLA's own count, loops once: {report.compiler_flops:.3e}"
        ),
        f"main memory traffic of a device, estimated: {costs.bytes / gib:.2f} GiB",
        f"sent by a device: {costs.sent / gib:.3f} GiB",
    ]
    lines += [
        f"    {c.kind} among {c.devices}{_across(c)}: {c.times} times, {c.sent / gib:.3f} GiB"
        for c in costs.collectives
    ]
    if costs.unknown_loops:
        lines.append(f"loops of unknown length, counted once: {costs.unknown_loops}")
    if (line := report.roofline) is not None:
        lines.append(
            f"roofline: {line.seconds:.3f} s a step, bound by {line.bound} (compute "
            f"{line.compute:.3f}, memory {line.memory:.3f}, links {line.links:.3f}); expected "
            f"model FLOP utilisation at most {line.utilisation:.1%}"
        )
    return "\n".join(lines)

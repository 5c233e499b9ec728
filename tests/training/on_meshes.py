"""Run by ``test_sharding`` on eight simulated devices: steps on meshes against one device.

Prints one JSON object: name of a check -> what was found. One process does all of it, so that
start-up and the reference programs are paid for once.
"""

import dataclasses
import functools
import gc
import json
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from memdlm_jax import partitioning
from memdlm_jax.checkpoints import digests
from memdlm_jax.checkpoints.training_state import TrainingCheckpoints
from memdlm_jax.diffusion import objective
from memdlm_jax.diffusion.objective import Targets, token_losses
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import inner_loop_for
from memdlm_jax.models import lora
from memdlm_jax.models.expert_parallel import sum_over_experts
from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.models.llada2 import LLaDA2, LLaDA2Config
from memdlm_jax.models.llada_moe import LLaDAMoE, LLaDAMoEConfig
from memdlm_jax.models.lora import LoraConfig
from memdlm_jax.models.quantize import quantized_tree
from memdlm_jax.parameters import partition
from memdlm_jax.training import hlo, optimizer, state
from memdlm_jax.training.parallel import CompiledSteps
from memdlm_jax.training.sharding import Layout, MeshConfig
from memdlm_jax.training.step import StepSetup
from tests.training import tiny

SIZES = dict(
    vocab_size=40, width=32, num_heads=4, num_kv_heads=2, hidden_features=48, mask_token_id=39,
    max_length=32,
)  # fmt: skip
DENSE = LLaDA(LLaDAConfig(**SIZES, num_layers=2))
MOE = LLaDAMoE(
    LLaDAMoEConfig(**SIZES, num_layers=1, num_experts=8, experts_per_token=2, expert_features=16)
)
LLADA2 = LLaDA2(
    LLaDA2Config(
        **SIZES, num_layers=1, dense_layers=0, head_dim=8, num_experts=8, experts_per_token=2,
        expert_features=16, router_groups=4, kept_router_groups=2, rotary_channels=4,
    )
)  # fmt: skip
EXAMPLE = MemoryConfig(layer_fraction=0.5, rank=2, alpha=4.0, meta_gradient="exact", steps=1)
GLOBAL = dataclasses.replace(EXAMPLE, scope="global")
FIRST_ORDER = dataclasses.replace(EXAMPLE, meta_gradient="first_order", steps=2)
DEVICE = dataclasses.replace(FIRST_ORDER, scope="device", groups=4, steps=1)
ROUTED = dataclasses.replace(EXAMPLE, layer_fraction=1.0)
OPTIMIZER = optimizer.OptimizerConfig(10, learning_rate=0.1, epsilon=1.0, clip_norm=None)
"""Epsilon of 1: an update is then nearly the gradient, whose tiny entries Adam would blow up."""
KEY = jax.random.key(7)


def rows():
    """Eight rows of sixteen tokens, of very unequal numbers of maskable ones."""
    batch = tiny.batch(rows=8, length=16)
    for row, fewer in enumerate((0, 11, 3, 8, 0, 12, 5, 1)):
        batch.maskable[row, 3 : 3 + fewer] = False
    return batch


def steps_on(model, memory, mesh=None, devices=None, frozen=None, **changes):
    """Compiled steps; without mesh and devices those of one device."""
    accumulation = changes.pop("accumulation", 1)
    config = dataclasses.replace(OPTIMIZER, accumulation=accumulation)
    devices = jax.devices() if mesh is not None and devices is None else devices
    return CompiledSteps(
        StepSetup(model, config, inner_loop_for(model, memory), **changes),
        lambda length: length, frozen,
        mesh, devices or jax.devices()[:1],
    )  # fmt: skip


@functools.cache
def theta_of(model):
    return jax.device_get(model.init(jax.random.key(0)))


def fresh(model):
    return state.create(jax.tree.map(np.array, theta_of(model)), OPTIMIZER)


def stepped(steps, start):
    """State and metrics after one step, on the host; the state stays on the devices too."""
    after, metrics = steps.train(steps.place(start), rows(), KEY, True)
    return after, jax.device_get((after, metrics))


def difference(found, expected):
    """Largest difference of gradients (in Adam's first moment), metrics and parameters.

    Each in units of the largest entry of its array.
    """
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)) for a, b in pairs)


class Checks:
    """What was found so far."""

    def __init__(self):
        self.found = {}

    def __call__(self, name, value):
        self.found[name] = value
        print(f"{time.process_time():6.1f} s  {name}: {value}", file=sys.stderr, flush=True)

    def steps(self, group, model, memory, ways, start=None, reference=None, **changes):
        """Compare one step in several ways with one device; return what took them."""
        start = jax.device_get(fresh(model) if start is None else start)
        one = steps_on(reference or model, memory, **changes)
        taken = {"one": one}
        _, expected = stepped(one, start)
        for name, (mesh, more) in ways.items():
            changed = changes | more
            taken[name] = steps_on(changed.pop("model", model), memory, mesh, **changed)
            _, found = stepped(taken[name], start)
            self(f"{group}/{name}", difference(found, expected))
        return taken


def dense(check):
    ways = {
        "data2_fsdp2_tensor2": (MeshConfig(fsdp=2, tensor=2), {}),
        # The share of a device, 20 of 40 tokens, by chunks that do not divide it.
        "data2_sequence2_tensor2": (
            MeshConfig(sequence=2, tensor=2), {"model": DENSE.with_config(vocab_chunk=7)}
        ),
    }  # fmt: skip
    check.steps("example_exact", DENSE, EXAMPLE, ways)
    ways = {"data8": (MeshConfig(), {})}
    elastic(check, check.steps("example_first_order", DENSE, FIRST_ORDER, ways))
    ways = {"data2_fsdp2_sequence2": (MeshConfig(2, 2, sequence=2), {})}
    check.steps("global_exact", DENSE, GLOBAL, ways)
    # Four memories of two rows each on eight devices.
    ways = {"data8": (MeshConfig(8), {})}
    check.steps("device_first_order", DENSE, DEVICE, ways)


def micro_batches(check):
    """Two micro-batches on four devices: uneven rows, and nothing drawn by a row's place."""
    ways = {
        "mesh": (MeshConfig(data=4, tensor=2), {"accumulation": 2}),
        "pmap": (None, {"accumulation": 2, "devices": jax.devices()[:4]}),
    }
    check.steps("micro_batches", DENSE, tiny.STEADY_MEMORY, ways, corruption=tiny.corrupt)


def experts(check):
    """Against all experts computed for all tokens."""
    oracle = MOE.with_config(dispatch="dense")
    ways = {"data2_expert4": (MeshConfig(data=2, expert=4), {})}
    check.steps("experts_exact", MOE, ROUTED, ways, reference=oracle)
    base = quantized_tree(
        theta_of(LLADA2), "nf4", lambda p: p.endswith("kernel") and "router" not in p, 8
    )
    adapted = lora.add(jax.random.key(1), LLADA2, base, LoraConfig(rank=2))
    parts = partition(adapted, lora.is_adapter)
    memory = dataclasses.replace(DEVICE, scope="global", groups=0, layer_fraction=1.0)
    ways = {"fsdp2_expert2_tensor2": (MeshConfig(1, 2, 2, 2), {})}
    check.steps(
        "adapters_on_narrow_experts", LLADA2.with_config(dispatch="dense"), memory, ways,
        start=state.create(parts.trainable, OPTIMIZER), frozen=parts.frozen,
    )  # fmt: skip


def chunked_losses(check):
    """Losses by chunks of a divided vocabulary against all logits at once, and who computes them.

    Of 37 tokens devices have shares of 10, 10, 10 and 7; of 5 the last one has none.
    """
    rng, layout = (
        np.random.default_rng(0),
        Layout(MeshConfig(fsdp=2, tensor=4).build(jax.devices())),
    )
    normalised = 9 * rng.normal(size=(4, 6, 8)).astype(np.float32)
    weight = rng.normal(size=(4, 6)).astype(np.float32)
    by_chunks = functools.partial(objective.chunked_token_losses, chunk=4)

    def derivatives(losses, normalised, kernel, labels):
        """Loss, gradient and the gradient's derivative, each row under the vmap of memories."""

        def one(normalised, labels, weight, kernel):
            targets = Targets(labels[None], labels[None], labels[None] >= 0)
            return jnp.sum(losses(normalised[None], kernel, targets) * weight)

        def total(normalised, kernel):
            rows = partitioning.map_groups(one, len(labels), (0, 0, 0, None))
            return jnp.sum(rows(normalised, labels, weight, kernel))

        wide = normalised, kernel
        return jax.jvp(jax.value_and_grad(total, (0, 1)), wide, jax.tree.map(jnp.sin, wide))

    def on_mesh(*arrays):
        with partitioning.context(layout.mesh):
            return derivatives(by_chunks, *arrays)

    for size in (40, 37, 5):
        theta = {"unembedding": rng.normal(size=(8, size)).astype(np.float32)}
        arrays = normalised, theta["unembedding"], rng.integers(0, size, (4, 6), np.int32)
        whole = functools.partial(derivatives, lambda h, w, targets: token_losses(h @ w, targets))
        want = jax.device_get(jax.jit(whole)(*arrays))
        places = layout.rows, layout.shardings(theta)["unembedding"], layout.rows
        step = jax.jit(on_mesh, in_shardings=places).lower(*arrays).compile()
        found = step(*jax.device_put(arrays, places))
        (found, second), (want, second_want) = jax.device_get(found), want
        check(f"chunks/{size}", difference(found, want))
        check(f"chunks/{size}_second", difference(second, second_want))
        if size == 40:  # Shares of 10: chunks of 4, 4 and 2.
            alone = jax.jit(functools.partial(derivatives, by_chunks)).lower(*arrays).compile()
            flops = [hlo.costs(p.as_text(), n).flops for p, n in ((step, 8), (alone, 1))]
            check("chunks_share_of_flops", flops[0] / flops[1])


def dropout_of_experts(check):
    """Who draws the same mask inside of experts: devices that hold the same tokens."""
    layout = Layout(MeshConfig(data=4, expert=2).build(jax.devices()))
    mesh = layout.mesh.abstract_mesh
    key = {"experts": {"params": {"up_proj": {"kernel": {"key": jax.random.key(0)}}}}}

    def some(x, variables, first, count):
        leaf = variables["experts"]["params"]["up_proj"]["kernel"]["key"]
        return jnp.where(jax.random.bernoulli(leaf, 0.5, x.shape), x, 0)

    def drop(x):
        return sum_over_experts(mesh, some, x, key, num_experts=2)

    def shares(function, rows):
        def on_mesh(x):
            with partitioning.context(mesh):
                return function(x)

        found = jax.jit(on_mesh)(jax.device_put(np.ones((rows, 4, 8)), layout.replicated))
        return [np.asarray(share.data) for share in found.addressable_shards]

    def equal(shares):
        return [all(np.array_equal(a, b) for b in shares) for a in shares]

    whole = shares(drop, 3)  # Four devices cannot divide three rows: each computes all.
    check("dropout_agrees/rows_whole", len(whole) == 8 and all(equal(whole)))
    own = shares(drop, 4)
    distinct = {share.tobytes() for share in own}
    check("dropout_agrees/rows_divided", len(distinct) == 4 and own[0].shape[0] == 1)
    mapped = shares(lambda x: partitioning.map_groups(lambda r: drop(r[None])[0], 4)(x), 4)
    check("dropout_agrees/memories", len(mapped) == 8 and all(equal(mapped)))


def elastic(check, taken):
    """Save after a step on one mesh, restore on another, go on there."""
    one = taken["one"]
    first, expected_first = stepped(one, jax.device_get(fresh(DENSE)))
    second = jax.device_get(one.train(first, rows(), jax.random.key(8), True))
    # These only keep the state, and are never compiled.
    taken["data2_tensor4"] = steps_on(DENSE, FIRST_ORDER, MeshConfig(2, tensor=4))
    taken["data4_fsdp2"] = steps_on(DENSE, FIRST_ORDER, MeshConfig(4, 2))
    for before, after in (
        ("data8", "one"), ("one", "data8"), ("data2_tensor4", "data4_fsdp2"),
    ):  # fmt: skip
        start = taken[before].place(expected_first[0])
        with tempfile.TemporaryDirectory() as folder:
            writer = TrainingCheckpoints(folder, {})
            writer.save(1, start, position=1)
            writer.close()
            reader = TrainingCheckpoints(folder, {})
            restored = reader.restore_latest(taken[after].place(fresh(DENSE)))
            reader.close()
        same = all(
            np.array_equal(a, b)
            for a, b in zip(*map(jax.tree.leaves, (restored.state, expected_first[0])), strict=True)
        )
        placed = taken[after].place(expected_first[0])
        lies = jax.tree.map(lambda a, b: a.sharding == b.sharding, restored.state, placed)
        result = {"equal": same, "placed": all(jax.tree.leaves(lies))}
        result["position"] = restored.position
        if after in ("one", "data8"):
            found = taken[after].train(restored.state, rows(), jax.random.key(8), True)
            result["next_step"] = difference(jax.device_get(found), second)
        check(f"elastic/{before}_to_{after}", result)


def refusals(check):
    steps = steps_on(DENSE, None, MeshConfig(2, 2, sequence=2))
    start = steps.place(fresh(DENSE))
    kernel = start.theta["layers"]["mlp"]["gate_proj"]["kernel"]
    moment = start.optimizer_state[0].mu["layers"]["mlp"]["gate_proj"]["kernel"]
    check("moments_follow", moment.sharding == kernel.sharding)
    check("share_of_kernel", kernel.addressable_shards[0].data.size / kernel.size)
    for name, batch in {
        "rows": tiny.batch(rows=6, length=16),
        "length": tiny.batch(8, 8, 15),
    }.items():
        try:
            steps.train(start, batch, KEY, True)
        except ValueError as error:
            check(f"refused_{name}", str(error))
    bad = steps_on(MOE.with_config(num_experts=6), None, MeshConfig(2, expert=4))
    check("undivided", {
        "mesh": list(map(str, bad.undivided(theta_of(MOE.with_config(num_experts=6))))),
        "divided": steps.undivided(theta_of(DENSE)), "one": steps_on(DENSE, None).undivided({}),
    })  # fmt: skip
    try:
        bad.train(bad.place(fresh(MOE.with_config(num_experts=6))), rows(), KEY, True)
    except ValueError as error:
        check("refused_experts", str(error))


def digested(check):
    """Digests of an array that lies in many ways, and the program of one of them."""
    array = np.random.default_rng(0).normal(size=(16, 8, 6)).astype(np.float32)
    mesh = MeshConfig(2, 2, 2).build(jax.devices())
    specs = [
        (), ("fsdp",), (None, ("data", "tensor")), (("tensor", "data", "fsdp"),),
        ("data", "fsdp", "tensor"),
    ]  # fmt: skip
    places = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]
    found = [digests.digest(jax.device_put(array, place)) for place in places]
    check("digests", {"one": digests.digest(array), "divided": found})
    large = jax.ShapeDtypeStruct((64, 256, 1024), np.float32, sharding=places[-1])
    program = digests._summing(places[-1], 3).lower(large).compile()
    check("digest_program", {
        "gathers": "all-gather" in program.as_text(),
        "temporary": program.memory_analysis().temp_size_in_bytes, "block": digests.BLOCK,
    })  # fmt: skip


def main():
    assert len(jax.devices()) == 8
    check = Checks()
    parts = (
        digested, refusals, dropout_of_experts, chunked_losses, dense, micro_batches, experts,
    )  # fmt: skip
    for part in parts:
        part(check)
    print(json.dumps(check.found))


if __name__ == "__main__":
    gc.disable()  # It ends before garbage matters; looking for cycles is a tenth of tracing.
    main()

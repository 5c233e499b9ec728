"""Meshes: rules that cover every parameter, refusals, and steps that equal those of one device."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from memdlm_jax import partitioning
from memdlm_jax.checkpoints.trees import named
from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.models import lora
from memdlm_jax.models.lora import LoraConfig
from memdlm_jax.models.published import PUBLISHED
from memdlm_jax.models.quantize import quantized_tree
from memdlm_jax.parameters import join_learned, partition
from memdlm_jax.training import state
from memdlm_jax.training.sharding import Layout, MeshConfig
from tests.models.small import FAMILIES
from tests.training import tiny


def layout(**sizes):
    """Of a mesh without devices: rules need its sizes only."""
    known = {axis: sizes.get(axis, 1) for axis in partitioning.AXES}
    types = (AxisType.Auto,) * len(known)
    return Layout(AbstractMesh(tuple(known.values()), tuple(known), types))


def abstract(build):
    return jax.eval_shape(build, jax.random.key(0))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["plain", "tied", "narrow", "learned"])
def test_a_rule_covers_every_array_of_a_state(name, kind):
    model = FAMILIES[name].with_config(tied=kind == "tied")
    memory = MemoryConfig(layer_fraction=0.5, rank=2, learned=("rates", "start"))

    def build(key):
        theta = model.init(key)
        if kind == "narrow":
            kernels = lambda p: p.endswith("kernel") and "router" not in p  # noqa: E731
            theta = quantized_tree(theta, "nf4", kernels, 8)
            parts = partition(lora.add(key, model, theta, LoraConfig(rank=2)), lora.is_adapter)
            return state.create(parts.trainable, tiny.OPTIMIZER), parts.frozen
        loop = InnerLoop(model, memory)
        learned = loop.init_learned(key) if kind == "learned" else None
        return state.create(join_learned(theta, learned), tiny.OPTIMIZER)

    placed = layout(fsdp=2, tensor=2, expert=2)
    specs = {path: placed.spec(path, leaf) for path, leaf in named(abstract(build)).items()}
    for path, spec in specs.items():
        if "/mu/" in path:
            assert spec == specs[path.replace("optimizer_state/0/mu", "theta").replace(
                "optimizer_state/1/mu", "theta")], path  # fmt: skip
    for path in specs:
        if path.endswith("mlp/gate_proj/kernel"):
            assert specs[path] == PartitionSpec(None, "fsdp", "tensor")
        if path.endswith("mlp/experts/down_proj/kernel"):
            assert specs[path] == PartitionSpec(None, "expert", "tensor", "fsdp")
        if path.endswith("/experts/up_proj/kernel/base/codes"):
            assert specs[path] == PartitionSpec(None, "expert", "fsdp", "tensor")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rule_covers_fast_weights(name):
    memory = MemoryConfig(layer_fraction=0.5, rank=2)
    phi = abstract(lambda key: fast_weights.init(key, FAMILIES[name], memory, 4))
    for path, leaf in named(phi).items():
        assert len(partitioning.parameter_dimensions(path, leaf.ndim)) == leaf.ndim


def test_an_array_without_a_rule_is_named():
    leaf = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    with pytest.raises(ValueError, match="no sharding rule covers parameter layers/mlp/extra"):
        layout(fsdp=2).spec("layers/mlp/extra", leaf)
    with pytest.raises(ValueError, match="embedding has 1 dimensions, its rule names"):
        layout(fsdp=2).spec("embedding", jax.ShapeDtypeStruct((2,), jnp.float32))


def test_what_cannot_be_divided_is_whole_and_reported_and_refused_where_it_is_large():
    path = "layers/mlp/gate_proj/kernel"
    small = {"layers": {"mlp": {"gate_proj": {"kernel": jax.ShapeDtypeStruct((2, 9, 8), "f4")}}}}
    mesh = layout(fsdp=2, tensor=4)
    assert mesh.spec(path, named(small)[path]) == PartitionSpec(None, None, "tensor")
    (note,) = mesh.whole(small)
    assert str(note) == f"{path}: embed=9 is not divided over mesh.fsdp"
    assert mesh.bytes_per_device(small) == 2 * 9 * 2 * 4
    large = jax.ShapeDtypeStruct((32, 4097, 4098), jnp.float32)
    with pytest.raises(ValueError, match=r"hidden=4098 is not divided over mesh.tensor: 2050 MB"):
        mesh.spec(path, large)
    assert mesh.replicated_bytes({"final_norm": {"scale": jnp.ones(9)}}) == {"final_norm/scale": 36}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 0}, r"mesh\.fsdp=0 must be at least 1, or -1"),
        ({"fsdp": -1}, "mesh has data and fsdp at -1: only one"),
        ({"fsdp": 3}, "mesh.data=-1.*mesh.fsdp=3.* do not multiply to the 8 devices: the others"),
        ({"data": 2}, "mesh.data=2.* do not multiply to the 8 devices: make one axis -1"),
    ],
)
def test_bad_meshes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**sizes).sizes(8)


def test_a_batch_that_does_not_divide_is_refused():
    mesh = layout(data=2, fsdp=2, sequence=4)
    mesh.check_batch(24, 32, accumulation=3)
    with pytest.raises(ValueError, match=r"18 rows must be a multiple of .* = 4 times .* = 3"):
        mesh.check_batch(18, 32, accumulation=3)
    with pytest.raises(ValueError, match=r"rows of 30 tokens must .* mesh\.sequence=4"):
        mesh.check_batch(24, 30)


def test_one_axis_is_the_rest():
    found = MeshConfig(fsdp=2, tensor=2).sizes(8)
    assert found == {"data": 2, "fsdp": 2, "expert": 1, "sequence": 1, "tensor": 2}
    assert MeshConfig().build(jax.devices()[:1]).size == 1


@pytest.mark.parametrize("name", ["llada_8b", "llada_moe_7b_a1b", "llada2_1_mini", "dream_7b"])
def test_no_large_parameter_of_a_published_model_is_whole_on_a_pod(name):
    model = PUBLISHED[name]
    mesh = layout(data=4, fsdp=64)
    whole = mesh.replicated_bytes(abstract(model.init))
    assert max(whole.values()) < 64 * 2**20, whole


def test_nothing_is_constrained_without_a_mesh():
    x = jnp.ones((4, 2))
    assert partitioning.constrain(x, "rows", None) is x

    def inside(x):
        return partitioning.map_groups(lambda row: partitioning.constrain(row, None), 4)(x)

    assert "sharding" not in str(jax.make_jaxpr(inside)(x))


def test_rows_within_memories_leave_their_axes_to_the_memories():
    mesh = layout(data=2, fsdp=2, tensor=2).mesh

    def inside(x):
        with partitioning.context(mesh):
            return partitioning.map_groups(
                lambda rows: partitioning.constrain(rows, "rows", None, "heads"), 4
            )(x)

    program = str(jax.make_jaxpr(inside)(jnp.ones((4, 4, 3, 2))))
    assert "(('data', 'fsdp'), UNCONSTRAINED, None, 'tensor')" in program


@pytest.fixture(scope="module")
def found(environment):
    """What ``on_meshes`` prints, from one process with eight simulated devices."""
    cheap = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8 {cheap}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.on_meshes"],
        env=os.environ | environment | {"XLA_FLAGS": flags}, capture_output=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


STEPS = [
    "example_exact/data2_fsdp2_tensor2",
    "example_exact/data2_sequence2_tensor2",
    "example_first_order/data8",
    "global_exact/data2_fsdp2_sequence2",
    "device_first_order/data8",
    "micro_batches/mesh",
    "micro_batches/pmap",
    "experts_exact/data2_expert4",
    "adapters_on_narrow_experts/fsdp2_expert2_tensor2",
]


@pytest.mark.distributed
@pytest.mark.parametrize("name", STEPS)
def test_a_step_equals_that_of_one_device(found, name):
    """Gradients, metrics and parameters, in units of each array's largest entry."""
    assert found[name] < 1e-5


CHUNKS = [f"chunks/{size}" for size in (40, 37, 5)]


@pytest.mark.distributed
@pytest.mark.parametrize("name", CHUNKS)
def test_a_loss_by_chunks_of_a_divided_vocabulary_is_that_of_all_logits(found, name):
    """Losses and gradients, and with more cancellation the gradients' derivatives."""
    assert found[name] < 1e-6
    assert found[f"{name}_second"] < 2e-5


@pytest.mark.distributed
def test_devices_share_the_products_of_a_loss_by_chunks(found):
    assert found["chunks_share_of_flops"] == 1 / 8


@pytest.mark.distributed
@pytest.mark.parametrize("what", ["rows_whole", "rows_divided", "memories"])
def test_devices_with_the_same_tokens_drop_the_same_of_them_in_experts(found, what):
    assert found[f"dropout_agrees/{what}"]


@pytest.mark.distributed
def test_every_step_that_is_taken_is_looked_at(found):
    assert {name for name, value in found.items() if type(value) is float} == {
        *STEPS, *CHUNKS, *(f"{name}_second" for name in CHUNKS), "chunks_share_of_flops",
        "share_of_kernel",
    }  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("way", ["one_to_data8", "data8_to_one", "data2_tensor4_to_data4_fsdp2"])
def test_a_checkpoint_restores_on_another_mesh(found, way):
    result = found[f"elastic/{way}"]
    assert result["equal"] and result["placed"] and result["position"] == 1
    assert result.get("next_step", 0) < 1e-5


@pytest.mark.distributed
def test_a_digest_does_not_depend_on_how_an_array_is_divided(found):
    assert set(found["digests"]["divided"]) == {found["digests"]["one"]}


@pytest.mark.distributed
def test_a_digest_gathers_nothing(found):
    """64 MiB, 8 MiB of them on each device: what it needs besides is some blocks of entries."""
    program = found["digest_program"]
    assert not program["gathers"] and 0 < program["temporary"] < 9 * 4 * program["block"]


@pytest.mark.distributed
def test_what_is_not_divided_is_told(found):
    notes = found["undivided"]
    assert notes["divided"] == notes["one"] == [] and len(notes["mesh"]) == 3
    assert all("=6 is not divided over mesh.expert" in note for note in notes["mesh"])


@pytest.mark.distributed
def test_moments_lie_with_their_parameters(found):
    assert found["moments_follow"] and found["share_of_kernel"] == 0.5


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("rows", "a batch of 6 rows must be a multiple of mesh.data * mesh.fsdp = 4"),
        ("length", "rows of 15 tokens must be a multiple of mesh.sequence=2"),
        ("experts", "mesh.expert=4 must divide num_experts=6"),
    ],
)
def test_what_a_mesh_cannot_divide_is_refused(found, what, message):
    assert found[f"refused_{what}"].startswith(message)

"""All published families: loaded in any layout and dtype, saved back bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from memdlm_jax.checkpoints import families, hugging_face
from memdlm_jax.models.dream import Dream
from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.models.llada2 import LLaDA2
from memdlm_jax.models.llada_moe import LLaDAMoE
from memdlm_jax.models.published import PUBLISHED
from memdlm_jax.models.quantize import Quantized, quantize
from tests.models.small import FAMILIES

GOLDEN = Path(__file__).parents[1] / "golden" / "backbones"
STORED = {"llada_dense": "float32", "llada_moe": "float32", "llada2_0": "float32",
          "llada2_1": "bfloat16", "dream": "float32"}  # fmt: skip


def tensors_of(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def same(a, b):
    a, b = jax.device_get((a, b))
    return jax.tree.all(
        jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    )


@pytest.mark.parametrize(("name", "dtype"), STORED.items())
def test_load_and_save_give_the_same_files(name, dtype, tmp_path):
    denoiser, theta = hugging_face.load(GOLDEN / name, dtype)
    hugging_face.save(tmp_path, denoiser, theta, like=GOLDEN / name, shard_bytes=300_000)
    before, after = tensors_of(GOLDEN / name), tensors_of(tmp_path)
    assert before.keys() == after.keys()
    assert all(before[k].tobytes() == after[k].tobytes() for k in before)
    assert all(before[k].dtype == after[k].dtype for k in before)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in before.values())
    config = json.loads((GOLDEN / name / "config.json").read_text())
    saved = json.loads((tmp_path / "config.json").read_text())
    changed = {k: v for k, v in config.items() if saved.get(k) != v}
    # null, 0 and 1 say the same in some fields; what the weights are is said anew.
    assert set(changed) <= {
        "architectures",
        "torch_dtype",
        "partial_rotary_factor",
        "norm_topk_prob",
    }
    again, loaded = hugging_face.load(tmp_path, dtype)
    assert again == denoiser and same(theta, loaded)


@pytest.mark.parametrize("name", FAMILIES)
def test_any_model_of_a_family_round_trips(name, tmp_path):
    model = FAMILIES[name].with_config(num_layers=4, num_kv_heads=1)
    theta = jax.jit(model.init)(jax.random.key(0))
    hugging_face.save(tmp_path, model, theta)
    again, loaded = hugging_face.load(tmp_path)
    assert again == model and same(theta, loaded)


def test_mixed_layers_round_trip(tmp_path):
    model = FAMILIES["llada_moe"].with_config(num_layers=5, dense_layers=(0, 3))
    theta = jax.jit(model.init)(jax.random.key(0))
    hugging_face.save(tmp_path, model, theta)
    assert "model.layers.3.mlp.up_proj.weight" in tensors_of(tmp_path)
    again, loaded = hugging_face.load(tmp_path)
    assert again == model and same(theta, loaded)


@pytest.mark.parametrize("piece_bytes", [300, 5000])
@pytest.mark.parametrize("name", ["llada_moe", "llada2_1"])
def test_pieces_give_the_same_weights(name, piece_bytes):
    """Leaves put together on the device, a few rows at a time."""
    _, whole = hugging_face.load(GOLDEN / name, STORED[name])
    _, pieces = hugging_face.load(GOLDEN / name, STORED[name], piece_bytes=piece_bytes)
    assert same(whole, pieces)


def test_a_shared_dtype_is_cast_once(tmp_path):
    """float16 on disk, parameters in bfloat16 and float32."""
    wide = tensors_of(GOLDEN / "llada_dense")
    half = {k: v.astype(np.float16) for k, v in wide.items()}
    save_file(half, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((GOLDEN / "llada_dense" / "config.json").read_bytes())
    model, theta = hugging_face.load(tmp_path, "bfloat16", "float32")
    assert model.config.dtype == "bfloat16" and theta["embedding"].dtype == jnp.float32
    np.testing.assert_array_equal(
        theta["embedding"], half["model.transformer.wte.weight"].astype(np.float32)
    )
    _, narrow = hugging_face.load(tmp_path, "bfloat16", piece_bytes=4000)
    assert narrow["embedding"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow["embedding"], theta["embedding"].astype(jnp.bfloat16))


@pytest.mark.parametrize("piece_bytes", [3000, 1 << 20])
def test_merged_experts_load_like_single_ones(tmp_path, piece_bytes):
    """The layout of LLaDA2's official training code: a layer's experts in one tensor."""
    tensors = tensors_of(GOLDEN / "llada2_1")
    merged = {k: v for k, v in tensors.items() if ".experts." not in k}
    for layer in (1, 2):
        for part in ("gate_proj", "up_proj", "down_proj"):
            stem = f"model.layers.{layer}.mlp.experts"
            stack = [tensors[f"{stem}.{e}.{part}.weight"] for e in range(16)]
            merged[f"{stem}.{part}"] = np.stack(stack)
    save_file(merged, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((GOLDEN / "llada2_1" / "config.json").read_bytes())
    _, theta = hugging_face.load(tmp_path, "bfloat16", piece_bytes=piece_bytes)
    assert same(theta, hugging_face.load(GOLDEN / "llada2_1", "bfloat16")[1])


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantising_on_the_way_equals_quantising_afterwards(kind):
    def narrow(path, matrices):
        return matrices if "/router/" in path else quantize(matrices, kind)

    _, theta = hugging_face.load(GOLDEN / "llada_moe")
    for piece_bytes in (5000, 1 << 20):
        _, found = hugging_face.load(
            GOLDEN / "llada_moe", transform=narrow, piece_bytes=piece_bytes
        )
        experts = found["layers"]["mlp"]["experts"]["up_proj"]["kernel"]
        assert isinstance(experts, Quantized)
        expected = jax.jit(quantize, static_argnums=1)(
            theta["layers"]["mlp"]["experts"]["up_proj"]["kernel"], kind
        )
        assert same(experts, expected)
        assert same(found["embedding"], theta["embedding"])
    with pytest.raises(ValueError, match="is Quantized, must be an array"):
        hugging_face.save("unused", FAMILIES["llada_moe"], found)


def test_leaves_lie_where_they_are_asked_to():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="unpinned_host")
    _, theta = hugging_face.load(
        GOLDEN / "llada_dense", sharding=lambda path, shape: device, piece_bytes=20_000
    )
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(theta)} == {"unpinned_host"}


class TestDispatch:
    def kind(self, **published):
        return families.backbone_of(published, "config.json")

    def test_architectures_decide(self):
        assert self.kind(architectures=["LLaDAMoEModel"], model_type="llada") is LLaDAMoE
        assert self.kind(architectures=["LLaDAModelLM"], model_type="llada") is LLaDA

    @pytest.mark.parametrize(
        ("kind", "family"),
        [
            ("llada", LLaDA),
            ("lladamoe", LLaDAMoE),
            ("llada2_moe", LLaDA2),
            ("llada2_moe_21", LLaDA2),
            ("llada21_moe", LLaDA2),
            ("llada2_moe_veomni", LLaDA2),
            ("Dream", Dream),
        ],
    )
    def test_the_model_type_without_architectures(self, kind, family):
        assert self.kind(model_type=kind) is family

    def test_two_families_share_a_model_type(self):
        assert self.kind(model_type="llada", num_experts=8) is LLaDAMoE

    def test_unknown(self):
        with pytest.raises(
            ValueError, match=r"architectures=\['Qwen2ForCausalLM'\] must be one of"
        ):
            self.kind(architectures=["Qwen2ForCausalLM"], model_type="Dream")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_survive_our_format(name):
    model = PUBLISHED[name]
    published = families.published_config(model, "bfloat16")
    again = families.denoiser_of(published, name, dtype="bfloat16", param_dtype="bfloat16")
    assert again == model


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llada_moe", {"clip_qkv": 8.0}, "clip_qkv=8.0 is unsupported, only None"),
        ("llada_moe", {"moe_layer_freq": [1]}, "must have num_hidden_layers entries"),
        ("llada2_0", {"rope_scaling": {"type": "yarn"}}, "rope_scaling="),
        ("llada2_0", {"rotary_dim": 6}, "rotary_dim=6 must be head_dim=8 times"),
        ("dream", {"use_sliding_window": True, "use_mrope": True}, "use_mrope=True.*; use_sliding"),
        ("dream", {"hidden_act": "gelu"}, "hidden_act='gelu' is unsupported, only 'silu'"),
    ],
)
def test_settings_that_we_do_not_compute_are_refused(tmp_path, name, changes, message):
    config = json.loads((GOLDEN / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        hugging_face.load(tmp_path)


class TestWeightFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        for file in (GOLDEN / "dream").iterdir():
            if file.name != "golden.npz":
                (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    def test_a_dtype_that_we_do_not_read(self, folder):
        file = folder / "model-00001-of-00003.safetensors"
        tensors = load_file(file)
        name = next(iter(tensors))
        save_file(tensors | {name: tensors[name].astype(np.int8)}, file)
        with pytest.raises(ValueError, match=f"{name} has dtype I8, expected F32, BF16 or F16"):
            hugging_face.load(folder)

    def test_a_tensor_in_two_shards(self, folder):
        first, second = sorted(folder.glob("*.safetensors"))[:2]
        name, value = next(iter(load_file(first).items()))
        save_file(load_file(second) | {name: value}, second)
        with pytest.raises(ValueError, match=f"{name} is both in"):
            hugging_face.load(folder)

    def test_a_shard_outside_the_folder(self, folder):
        index = {"weight_map": {"a": "../model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="shards must be safetensors in the folder itself"):
            hugging_face.load(folder)

    def test_pickles_are_named_and_not_read(self, folder):
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin.*pickles, which are never"):
            hugging_face.load(folder)


_PROGRAM = """
import sys
import jax
from memdlm_jax.checkpoints import hugging_face

def memory(kind):
    # Not ru_maxrss: it starts at what the parent process had.
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(kind))
    return int(line.split()[1]) * 1024

jax.jit(lambda x: x + 1)(1.0)
before = memory("VmRSS")
theta = jax.block_until_ready(hugging_face.load(sys.argv[1], "bfloat16")[1])
arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(theta))
print(memory("VmHWM") - before - arrays)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_host_holds_no_more_than_a_shard(tmp_path):
    """On the CPU the arrays themselves count as memory of the process: they are taken off."""
    sizes = dict(vocab_size=4096, width=1024, num_layers=32, num_heads=8, num_kv_heads=8,
                 hidden_features=2048, mask_token_id=0, max_length=64)  # fmt: skip
    model = LLaDA(LLaDAConfig(**sizes, dtype="bfloat16", param_dtype="bfloat16"))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    theta = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    hugging_face.save(tmp_path, model, theta, shard_bytes=300_000_000)
    largest = max(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(theta))
    del theta
    assert total > 2 * largest - 1e6
    # As users run it: without the optimisations that tests switch off nothing is done in place.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "XLA"))}
    said = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(tmp_path)],
        capture_output=True, text=True, check=True, env=own,
    )  # fmt: skip
    assert int(said.stdout) <= 1.1 * largest


_SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.models.quantize import quantize

mesh = Mesh(np.array(jax.devices()), ("x",))

def where(path, shape):
    last = PartitionSpec(*[None] * (len(shape) - 1), "x")
    return NamedSharding(mesh, last if shape[-1] % 4 == 0 else PartitionSpec())

def narrow(path, matrices):
    return matrices if "/router/" in path else quantize(matrices, "nf4")

for transform in (None, narrow):
    _, whole = hugging_face.load(sys.argv[1], transform=transform)
    _, parts = hugging_face.load(
        sys.argv[1], transform=transform, sharding=where, piece_bytes=4000
    )
    same = jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), whole, parts)
    assert jax.tree.all(same)
    up = jax.tree.leaves(parts["layers"]["mlp"]["experts"]["up_proj"]["kernel"])[0]
    assert len(up.sharding.device_set) == 4
    assert up.addressable_shards[0].data.shape[-1] == up.shape[-1] // 4
"""


def test_leaves_are_written_onto_several_devices():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    subprocess.run(
        [sys.executable, "-c", _SHARDED, str(GOLDEN / "llada_moe")],
        env=os.environ | {"XLA_FLAGS": flags}, check=True, timeout=300,
    )  # fmt: skip

"""Adapters in PEFT's format, against adapters that PEFT wrote and what PyTorch made of them."""

import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.flax import save_file as save_flax
from safetensors.numpy import load_file, save_file

from memdlm_jax.checkpoints import hugging_face, peft, weights
from memdlm_jax.models import lora
from memdlm_jax.models.lora import Adapted, LoraConfig
from memdlm_jax.models.quantize import quantized_tree
from memdlm_jax.parameters import partition

GOLDEN = Path(__file__).parents[1] / "golden" / "backbones"
BASES = {
    "lora_llada_dense": "llada_dense",
    "lora_llada_dense_all": "llada_dense",
    "lora_llada_moe": "llada_moe",
    "lora_llada2_1": "llada2_1",
}
PUBLIC = pytest.mark.parametrize("name", list(BASES))
BLOCK = "base_model.model.model.transformer.blocks.{}.{}.lora_{}.weight"


@pytest.fixture(scope="module")
def bases():
    """Name of a tiny backbone -> (denoiser, theta); each is loaded once."""
    return {name: hugging_face.load(GOLDEN / name) for name in set(BASES.values())}


@pytest.fixture
def dense(bases):
    return bases["llada_dense"]


def copied(name, tmp_path):
    """A public adapter, to be spoilt."""
    folder = tmp_path / name
    folder.mkdir()
    for file in (peft.CONFIG, peft.WEIGHTS):
        shutil.copyfile(GOLDEN / name / file, folder / file)
    return folder


@pytest.fixture
def folder(tmp_path):
    return copied("lora_llada_dense_all", tmp_path)


def settings(folder):
    return json.loads((folder / peft.CONFIG).read_text())


def change(folder, tensors=None, **changes):
    """Change settings and tensors; ``None`` removes a tensor, ``...`` a setting."""
    kept = {k: v for k, v in (settings(folder) | changes).items() if v is not ...}
    (folder / peft.CONFIG).write_text(json.dumps(kept))
    found = load_file(folder / peft.WEIGHTS) | (tensors or {})
    save_file({k: v for k, v in found.items() if v is not None}, folder / peft.WEIGHTS)


def logits(denoiser, theta, tokens):
    """[b, l, v]; compiled, which is quicker than op by op."""
    trunk = functools.partial(denoiser.trunk, split=denoiser.num_layers)
    return jax.jit(lambda theta: denoiser.readout(theta, trunk(theta, tokens)))(theta)


def same(left, right):
    """Whether two trees are equal in structure, dtypes and bits."""
    if jax.tree.structure(left) != jax.tree.structure(right):
        return False
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), left, right)


def trained(denoiser, theta, config):
    """Theta with adapters whose A and B are random, as after training."""
    draw = np.random.default_rng(0)
    flat = traverse_util.flatten_dict(theta, sep="/")
    for path in lora.targets(denoiser, theta, config):
        *stack, rows, columns = flat[path].shape
        a = draw.normal(size=(*stack, rows, config.rank)).astype(np.float32)
        b = draw.normal(size=(*stack, config.rank, columns)).astype(np.float32)
        flat[path] = Adapted(flat[path], a, b, scale=config.scale, dropout=config.dropout)
    return traverse_util.unflatten_dict(flat, sep="/")


def added_by_name(tmp_path, base, tensors, scale_of):
    """Theta of a published checkpoint to whose tensors ``scale B A`` was added by their names."""
    below = tmp_path / f"merged_{base}"
    shutil.copytree(GOLDEN / base, below)
    for file in below.glob("*.safetensors"):
        plain = load_file(file)
        for name in plain:
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
            if key.format("A") in tensors:
                delta = tensors[key.format("B")] @ tensors[key.format("A")]
                plain[name] = plain[name] + np.float32(scale_of(name)) * delta
        save_file(plain, file)
    return hugging_face.load(below)[1]


def hit(published, targets):
    """The modules of a checkpoint that PEFT takes for a list of targets."""
    modules = {".".join(n.split(".")[:i]) for n in published for i in range(1, n.count(".") + 1)}
    return {m for m in modules if m in targets or any(m.endswith(f".{t}") for t in targets)}


def tensors_of(base):
    return set(weights.contents(weights.files(GOLDEN / base)))


def modules_in(folder):
    keys = load_file(folder / peft.WEIGHTS)
    return {k.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for k in keys}


@PUBLIC
def test_logits_are_those_of_the_public_code(bases, name):
    denoiser, theta = bases[BASES[name]]
    golden = np.load(GOLDEN / name / "golden.npz")
    adapted, config = peft.load(GOLDEN / name, denoiser, theta)
    assert (config.rank, config.alpha, config.dropout) == (4, 8.0, 0.05)
    tokens = jnp.asarray(golden["input_ids"])
    ours = logits(denoiser, adapted, tokens)
    np.testing.assert_allclose(ours, golden["logits"], atol=5e-5)
    assert np.abs(golden["logits"] - golden["logits_base"]).max() > 0.1
    if name in ("lora_llada_dense_all", "lora_llada_moe"):
        np.testing.assert_allclose(logits(denoiser, lora.merge(adapted), tokens), ours, atol=1e-4)


@PUBLIC
def test_a_public_adapter_is_saved_as_it_was(bases, name, tmp_path):
    denoiser, theta = bases[BASES[name]]
    adapted, config = peft.load(GOLDEN / name, denoiser, theta)
    peft.save(tmp_path, denoiser, adapted, config, peft.base_of(GOLDEN / name))
    before, after = (load_file(where / peft.WEIGHTS) for where in (GOLDEN / name, tmp_path))
    assert same(before, after)
    public, ours = settings(GOLDEN / name), settings(tmp_path)
    assert sorted(ours.pop("target_modules")) == sorted(public.pop("target_modules"))
    assert ours == {field: public[field] for field in ours}
    assert sorted(file.name for file in tmp_path.iterdir()) == [peft.CONFIG, peft.WEIGHTS]


@pytest.mark.parametrize("base", sorted(set(BASES.values())))
def test_round_trip_is_bit_equal(bases, base, tmp_path):
    denoiser, theta = bases[base]
    config = LoraConfig(rank=3, alpha=7.5, dropout=0.1, use_rslora=True)
    adapted = trained(denoiser, theta, config)
    peft.save(tmp_path, denoiser, adapted, config, "some/base")
    again, found = peft.load(tmp_path, denoiser, theta)
    assert same(again, adapted)
    assert found.scale == config.scale and found.dropout == 0.1
    assert lora.targets(denoiser, theta, found) == lora.targets(denoiser, theta, config)
    assert peft.base_of(tmp_path) == "some/base"
    peft.save(tmp_path, denoiser, partition(adapted, lora.is_adapter), config)
    assert same(peft.load(tmp_path, denoiser, theta)[0], adapted)


def test_fresh_adapters_are_the_identity_to_the_bit_and_survive(dense, tmp_path):
    denoiser, theta = dense
    config = LoraConfig(rank=2, target_modules=("q_proj", "down_proj"))
    fresh = lora.add(jax.random.key(0), denoiser, theta, config)
    plain, ours = (logits(denoiser, t, jnp.arange(12).reshape(2, 6)) for t in (theta, fresh))
    np.testing.assert_array_equal(ours, plain)
    peft.save(tmp_path, denoiser, fresh, config)
    assert same(peft.load(tmp_path, denoiser, theta)[0], fresh)


@pytest.mark.parametrize(
    ("base", "targets", "expected"),
    [
        ("llada_dense", ("down_proj",), ["0.ff_out", "1.ff_out", "2.ff_out"]),
        ("llada_dense", ("attention",), ["attn_out", "k_proj", "q_proj", "v_proj"]),
        ("llada_moe", ("router",), ["gate"]),
        ("llada_moe", ("experts/up_proj",), ["up_proj"]),
        ("llada2_1", ("shared_experts/up_proj",), ["shared_experts.up_proj"]),
        ("llada2_1", ("experts/up_proj",), [f"{i}.up_proj" for i in range(16)]),
        ("llada2_1", ("query_key_value", "o_proj"), ["dense", "query_key_value"]),
    ],
)
def test_targets_hit_what_is_adapted_and_nothing_else(bases, base, targets, expected, tmp_path):
    denoiser, theta = bases[base]
    config = LoraConfig(rank=2, target_modules=targets)
    peft.save(tmp_path, denoiser, lora.add(jax.random.key(0), denoiser, theta, config), config)
    written = settings(tmp_path)["target_modules"]
    assert sorted(written) == sorted(expected)
    assert hit(tensors_of(base), written) == modules_in(tmp_path)


def test_quantised_base(dense):
    """An adapter on a quantised base does what it does on the same base decoded."""
    denoiser, theta = dense
    theta = quantized_tree(theta, "nf4", lambda path: path.endswith("/kernel"))
    adapted, _ = peft.load(GOLDEN / "lora_llada_dense", denoiser, theta)
    tokens = jnp.arange(12).reshape(2, 6)
    ours = logits(denoiser, adapted, tokens)
    np.testing.assert_allclose(ours, logits(denoiser, lora.merge(adapted), tokens), atol=1e-4)


def test_what_an_adapter_lacks_is_zero_and_is_not_saved(bases, tmp_path):
    """Without a layer's router and two experts; their neighbours stay where they belong."""
    denoiser, theta = bases["llada_moe"]
    folder = copied("lora_llada_moe", tmp_path)
    lacks = ("layers.0.mlp.gate.", "layers.1.mlp.experts.0.", "layers.0.mlp.experts.5.up_proj.")
    found = load_file(folder / peft.WEIGHTS)
    change(folder, {key: None for key in found if any(part in key for part in lacks)})
    tensors = load_file(folder / peft.WEIGHTS)
    assert len(found) - len(tensors) == 2 * (1 + 3 + 1)
    adapted, config = peft.load(folder, denoiser, theta)
    expected = added_by_name(tmp_path, "llada_moe", tensors, lambda name: 2.0)
    close(lora.merge(adapted), expected)
    peft.save(tmp_path, denoiser, adapted, config)
    assert same(load_file(tmp_path / peft.WEIGHTS), tensors)
    written = settings(tmp_path)["target_modules"]
    assert hit(tensors_of("llada_moe"), written) == modules_in(folder)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_of_rank_and_alpha(dense, folder, use_rslora, tmp_path):
    """Ranks may differ within a stack, alphas from stack to stack."""
    denoiser, theta = dense
    draw = np.random.default_rng(0)
    wide = 9 if use_rslora else 6
    small = {
        BLOCK.format(1, "q_proj", "A"): draw.normal(size=(wide, 64)).astype(np.float32),
        BLOCK.format(1, "q_proj", "B"): draw.normal(size=(64, wide)).astype(np.float32),
    }
    # The same scale as the neighbours': 12 / 6 = 8 / 4 and 12 / sqrt(9) = 8 / sqrt(4).
    alphas = {"attn": 99, "1.q_proj": 12, "blocks.[0-2].ff_out": 5}
    patterns = {"rank_pattern": {"1.q_proj": wide}, "alpha_pattern": alphas}
    change(folder, small, use_rslora=use_rslora, **patterns)
    adapted, config = peft.load(folder, denoiser, theta)
    tensors, root = load_file(folder / peft.WEIGHTS), 2.0 if use_rslora else 4.0
    expected = added_by_name(
        tmp_path, "llada_dense", tensors, lambda name: (5 if "ff_out" in name else 8) / root
    )
    close(lora.merge(adapted), expected)
    assert adapted["layers"]["attention"]["q_proj"]["kernel"].A.shape == (3, 64, wide)
    peft.save(tmp_path, denoiser, adapted, config)
    assert same(load_file(tmp_path / peft.WEIGHTS), tensors)
    assert settings(tmp_path)["rank_pattern"] == {"1.q_proj": wide}
    assert settings(tmp_path)["alpha_pattern"] == {"1.q_proj": 12, "ff_out": 5}
    assert same(peft.load(tmp_path, denoiser, theta)[0], adapted)


def test_scales_that_differ_in_a_stack_are_refused(dense, folder):
    change(folder, alpha_pattern={"1.q_proj": 16})
    with pytest.raises(ValueError, match=r"q_proj/kernel would need the scales \[2\.0, 4\.0\]"):
        peft.load(folder, *dense)


def test_a_bfloat16_adapter_is_held_in_float32(dense, folder):
    tensors = load_file(folder / peft.WEIGHTS)
    rounded = {key: jnp.asarray(t, jnp.bfloat16) for key, t in tensors.items()}
    save_flax(rounded, folder / peft.WEIGHTS)
    adapted, _ = peft.load(folder, *dense)
    a = adapted["layers"]["mlp"]["down_proj"]["kernel"].A
    assert a.dtype == jnp.float32
    np.testing.assert_array_equal(a[2], rounded[BLOCK.format(2, "ff_out", "A")].T)


UNSUPPORTED = {
    "use_dora": True, "use_qalora": True, "lora_bias": True, "fan_in_fan_out": True,
    "modules_to_save": ["lm_head"], "layer_replication": [[0, 2]], "target_parameters": ["gate"],
    "trainable_token_indices": [1], "init_lora_weights": "pissa_niter_4", "peft_type": "LOHA",
    "bias": "lora_only", "a_later_setting": 1,
}  # fmt: skip
MALFORMED = [
    ("r", ..., "r=None must be an integer above 0"),
    ("r", "4", "r='4' must be an integer above 0"),
    ("lora_alpha", 0, "lora_alpha=0 must be a number above 0"),
    ("lora_dropout", 1, r"lora_dropout=1 must be a number in \[0, 1\)"),
    ("rank_pattern", {"q_proj": 1.5}, "rank_pattern={'q_proj': 1.5} must be a map to integers"),
    ("alpha_pattern", [3], r"alpha_pattern=\[3\] must be a map to numbers"),
    ("target_modules", 3, "target_modules=3 must be a list"),
]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [(k, v, f"{k}={re.escape(repr(v))} is unsupported") for k, v in UNSUPPORTED.items()]
    + MALFORMED,
)
def test_settings_that_we_do_not_compute(dense, folder, name, value, message):
    change(folder, **{name: value})
    for read in (peft.config_of, lambda folder: peft.load(folder, *dense)):
        with pytest.raises(ValueError, match=message):
            read(folder)


def test_one_error_lists_all_that_does_not_fit(dense, folder):
    zeros, head = np.zeros((4, 64), np.float32), "base_model.model.model.transformer"
    spoilt = {
        f"{head}.ff_out.lora_A.weight": zeros,
        f"{head}.wte.lora_embedding_A": zeros,
        "model.transformer.blocks.0.q_proj.lora_A.weight": zeros,
        f"{head}.blocks.0.attn_norm.lora_B.weight": zeros,
        BLOCK.format(3, "q_proj", "A"): zeros,
        BLOCK.format(0, "q_proj", "B"): None,
        BLOCK.format(1, "q_proj", "A"): zeros[:, :5].copy(),
        BLOCK.format(2, "q_proj", "B"): np.zeros((64, 4)),
    }
    change(folder, spoilt, use_dora=True)
    with pytest.raises(ValueError) as caught:
        peft.load(folder, *dense)
    parts = [
        "use_dora=True is unsupported",
        f"{head}.ff_out.lora_A.weight: adapters stand on linear layers, the unembedding excepted",
        f"unexpected {head}.wte.lora_embedding_A",
        "unexpected model.transformer.blocks.0.q_proj.lora_A.weight",
        f"{head}.blocks.0.attn_norm.lora_B.weight: adapters stand on linear layers",
        f"unexpected {BLOCK.format(3, 'q_proj', 'A')}",
        f"{BLOCK.format(0, 'q_proj', 'A')} has no partner {BLOCK.format(0, 'q_proj', 'B')}",
        f"{BLOCK.format(1, 'q_proj', 'A')} has shape (4, 5), expected (4, 64)",
        f"{BLOCK.format(2, 'q_proj', 'B')} has dtype F64",
    ]
    assert [part for part in parts if part not in str(caught.value)] == []
    save_file({}, folder / peft.WEIGHTS)
    with pytest.raises(ValueError, match="holds no tensors"):
        peft.load(folder, *dense)


def test_a_kernel_carries_one_adapter(dense):
    adapted, _ = peft.load(GOLDEN / "lora_llada_dense", *dense)
    with pytest.raises(ValueError, match="v_proj/kernel carries an adapter already: merge it"):
        peft.load(GOLDEN / "lora_llada_dense", dense[0], adapted)


def test_the_router_of_llada2_carries_none(bases, tmp_path):
    denoiser, theta = bases["llada2_1"]
    folder = copied("lora_llada2_1", tmp_path)
    name = "base_model.model.model.layers.1.mlp.gate.lora_{}.weight"
    shapes = {name.format("A"): (4, 64), name.format("B"): (16, 4)}
    change(folder, {key: np.zeros(shape, np.float32) for key, shape in shapes.items()})
    with pytest.raises(ValueError, match=r"gate\.lora_A\.weight: the router of this model is no"):
        peft.load(folder, denoiser, theta)
    adapted, config = peft.load(GOLDEN / "lora_llada2_1", denoiser, theta)
    gate = adapted["layers_1"]["mlp"]["router"]["gate"]
    layers, inputs, experts = gate["kernel"].shape
    gate["kernel"] = Adapted(
        gate["kernel"], jnp.ones((layers, inputs, 4)), jnp.ones((layers, 4, experts))
    )
    with pytest.raises(ValueError, match="router/gate/kernel carries an adapter, but the router"):
        peft.save(tmp_path, denoiser, adapted, config)


def test_there_must_be_something_to_save(dense, tmp_path):
    with pytest.raises(ValueError, match="theta carries no adapters"):
        peft.save(tmp_path / "new", *dense, LoraConfig())
    assert not (tmp_path / "new").exists()


def test_a_save_that_fails_leaves_what_was_there(dense, folder, monkeypatch):
    adapted, config = peft.load(folder, *dense)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(peft, "save_file", half)
    with pytest.raises(OSError, match="the disk is full"):
        peft.save(folder, dense[0], adapted, config, "another/base")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_pickle_is_never_read(dense, folder):
    (folder / peft.WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"'adapter_model.bin'\] are pickles, which are nev"
    ):
        peft.load(folder, *dense)
    (folder / peft.CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json is missing"):
        peft.load(folder, *dense)


def test_settings_alone(folder):
    assert peft.base_of(folder) == "GSAI-ML/LLaDA-8B-Base"
    change(folder, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="base_model_name_or_path=None must name the model"):
        peft.base_of(folder)
    change(folder, target_modules="all-linear")
    assert peft.config_of(folder) == LoraConfig(rank=4, alpha=8.0, dropout=0.05)
    change(folder, target_modules=["v_proj", "q_proj"])
    assert peft.config_of(folder).target_modules == ("q_proj", "v_proj")

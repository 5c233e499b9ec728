"""Model folders in the published format."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.models.llada import LLaDA, LLaDAConfig

SIZES = dict(
    vocab_size=20, width=16, num_layers=3, num_heads=4, num_kv_heads=2, hidden_features=24,
    mask_token_id=1, max_length=32,
)  # fmt: skip


def random_theta(model, seed=0):
    """Numbers of numpy's: nothing to compile."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape).astype(x.dtype)), shapes)


def same(theta, other):
    return jax.tree.all(jax.tree.map(np.array_equal, *jax.device_get((theta, other))))


@pytest.fixture
def folder(tmp_path):
    model = LLaDA(LLaDAConfig(**SIZES))
    hugging_face.save(tmp_path, model, random_theta(model))
    return tmp_path


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {k: v for k, v in config.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_equal(tmp_path, tied, dtype):
    model = LLaDA(LLaDAConfig(**SIZES, tied=tied, dtype=dtype, param_dtype=dtype))
    theta = random_theta(model)
    hugging_face.save(tmp_path, model, theta)
    again, loaded = hugging_face.load(tmp_path, dtype)
    assert again == model
    assert same(theta, loaded)
    assert all(
        a.dtype == b.dtype for a, b in zip(*map(jax.tree.leaves, (theta, loaded)), strict=True)
    )


def test_published_layout(folder):
    """Published names, [out, in] matrices; the head shares its leaf name with the down map."""
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.transformer.blocks.2.ff_proj.weight"].shape == (24, 16)
    assert tensors["model.transformer.blocks.0.ff_out.weight"].shape == (16, 24)
    assert tensors["model.transformer.blocks.0.k_proj.weight"].shape == (8, 16)
    assert tensors["model.transformer.ff_out.weight"].shape == (20, 16)


def cut_into_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({n: tensors[n] for n in held}, folder / file)
    index = {"weight_map": {n: file for file, held in parts.items() for n in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_shards_load_like_one_file(folder):
    _, whole = hugging_face.load(folder)
    cut_into_shards(folder)
    _, sharded = hugging_face.load(folder)
    assert same(whole, sharded)


def test_saving_over_shards_replaces_them(folder):
    cut_into_shards(folder)
    (folder / "kept.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    model = LLaDA(LLaDAConfig(**SIZES))
    theta = random_theta(model, 1)
    hugging_face.save(folder, model, theta)
    _, loaded = hugging_face.load(folder)
    assert same(theta, loaded)
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json", "kept.safetensors", "model.safetensors"
    ]  # fmt: skip


def test_only_files_of_the_folder_are_removed(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "x.safetensors"
    outside.touch()
    index = {"weight_map": {"a": str(outside), "b": f"../{outside.parent.name}/x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model = LLaDA(LLaDAConfig(**SIZES))
    hugging_face.save(folder, model, random_theta(model, 1))
    assert outside.exists() and not (folder / "model.safetensors.index.json").exists()


def test_a_save_that_fails_leaves_what_was_there(folder, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(hugging_face, "save_file", half)
    model = LLaDA(LLaDAConfig(**SIZES))
    with pytest.raises(OSError, match="the disk is full"):
        hugging_face.save(folder, model, random_theta(model, 1))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_the_digest_is_of_all_weights_and_of_nothing_else(folder):
    whole = hugging_face.weights_digest(folder)
    (folder / "inner_parameters.safetensors").write_bytes(b"of a memory")
    assert hugging_face.weights_digest(folder) == whole
    cut_into_shards(folder)
    sharded = hugging_face.weights_digest(folder)
    (folder / "b.safetensors").write_bytes(b"other")
    assert len({whole, sharded, hugging_face.weights_digest(folder)}) == 3
    (folder / "a.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors is missing"):
        hugging_face.weights_digest(folder)


def test_every_misfit_is_listed(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.transformer.ln_f.weight")
    tensors["model.transformer.wte.weight"] = np.zeros((3, 16), np.float32)
    tensors["stray"] = np.zeros(2, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        hugging_face.load(folder)
    for part in ("missing model.transformer.ln_f.weight", "[3, 16], expected [20, 16]",
                 "unexpected stray"):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"block_type": "sequential"}, "block_type='sequential' is unsupported"),
        ({"include_qkv_bias": True}, "include_qkv_bias"),
        ({"d_model": ...}, "'d_model' is missing"),
        ({"mask_token_id": 99}, r"mask_token_id=99 must lie in \[0, vocab_size=20\)"),
        ({"n_heads": 3}, "width=16"),
    ],
)
def test_bad_config(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        hugging_face.load(folder)


def test_truncated_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        hugging_face.load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        hugging_face.load(folder)

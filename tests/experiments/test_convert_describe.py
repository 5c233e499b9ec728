"""Scripts around model folders: converting, describing."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import convert, describe
from memdlm_jax.checkpoints import hugging_face, orbax_model
from memdlm_jax.checkpoints.training_state import CorruptCheckpoint
from memdlm_jax.models import lora

GOLDEN = Path(__file__).parents[1] / "golden" / "backbones"


def same(a, b):
    equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool(jnp.array_equal(x, y)), a, b)
    return jax.tree.all(equal)


def test_to_orbax_and_back_bit_for_bit(tmp_path, capsys):
    source = GOLDEN / "llada2_1"
    convert.main([str(source), str(tmp_path / "orbax")])
    convert.main([str(tmp_path / "orbax"), str(tmp_path / "back")])
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'orbax'}: orbax", f"{tmp_path / 'back'}: hugging_face"
    ]  # fmt: skip
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[k].tobytes() == after[k].tobytes() for k in before)


def test_a_flipped_byte_is_found(tmp_path):
    denoiser, theta = hugging_face.load(GOLDEN / "llada_dense")
    orbax_model.save(tmp_path, denoiser, theta)
    again, loaded = orbax_model.load(tmp_path)
    assert again == denoiser and same(theta, loaded)
    data = max((tmp_path / "orbax").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CorruptCheckpoint):
        orbax_model.load(tmp_path)


def test_an_adapter_is_merged(tmp_path):
    base, adapter = GOLDEN / "llada_dense", GOLDEN / "lora_llada_dense"
    convert.main([str(adapter), str(tmp_path / "merged"), f"--base={base}"])
    _, merged = hugging_face.load(tmp_path / "merged")
    _, theta = hugging_face.load(adapter, base=base)
    assert same(merged, lora.merge(theta))
    assert not same(merged, hugging_face.load(base)[1])


def test_another_dtype_and_small_files(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in (GOLDEN / "llada_dense").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "tokenizer_config.json").write_text("{}")
    target = tmp_path / "target"
    arguments = [str(source), str(target), "--to=hugging_face", "--dtype=bfloat16"]
    convert.main([*arguments, "--shard-bytes=200000"])
    assert (target / "tokenizer_config.json").read_text() == "{}"
    assert len(list(target.glob("model-*.safetensors"))) > 1
    assert not (target / "golden.npz").exists()
    assert hugging_face.stored_dtype(target) == "bfloat16"


@pytest.mark.parametrize("name", ["source", "missing"])
def test_errors_are_one_line(tmp_path, name):
    (tmp_path / "source").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    target = tmp_path / ("full" if name == "source" else "new")
    with pytest.raises(SystemExit, match=r"^error: .*(not empty|is missing)"):
        convert.main([str(tmp_path / name), str(target)])


def described(capsys, *arguments):
    describe.main(list(arguments))
    return capsys.readouterr().out


def test_a_published_model_by_name(capsys):
    said = described(capsys, "llada2_1_mini", "--rows=8")
    assert "16,255,643,392 parameters, 1,432,973,056 of them met by one token" in said
    assert "fast weights in layers 18 .. 19" in said
    assert "layers_1/mlp/experts/gate_proj         2x256x2048x512   41,943,040" in said
    assert "505,282,560 bytes (0.471 GiB)" in said


def test_a_folder_without_its_weights(tmp_path, capsys):
    config = (GOLDEN / "llada_dense" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    said = described(capsys, str(tmp_path), "--rank=4")
    weights = load_file(GOLDEN / "llada_dense" / "model.safetensors")
    assert f"{sum(v.size for v in weights.values()):,} parameters" in said
    # 1 layer: gate and up 64 -> 192, down 192 -> 64.
    assert f"{3 * 4 * (64 + 192):,}" in said


def test_what_does_not_fit_is_refused(capsys):
    with pytest.raises(SystemExit, match=r"error: this run needs at least 119\.82 GiB"):
        described(capsys, "llada_8b", "--limit-gib=80")
    said = described(capsys, "llada_8b", "--limit-gib=80", "--base=nf4", "--lora-rank=32")
    assert "trained" in said and "layers/mlp/up_proj/kernel/base/codes" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing is no folder and none of"),
        (["llada_8b", "--base=int8"], "--base=int8 needs --lora-rank"),
        (["llada_8b", "--target-modules", "router"], "target_modules has 'router', unknown"),
        (["llada_8b", "--rank=0"], "memory.rank=0 must be at least 1"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        described(capsys, *arguments)


def test_bytes_of_a_training_step():
    """By hand: 4 bytes a parameter, gradient and two moments, phi and its gradient."""
    from memdlm_jax.memory.config import MemoryConfig
    from memdlm_jax.training import fit
    from tests.models.small import small

    model = small("llada")
    theta = jax.eval_shape(model.init, jax.random.key(0))
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(theta))
    memory = MemoryConfig(rank=2, layer_fraction=0.3)
    phi = 2 * (16 + 24) * 3
    need = fit.needed(model, theta, None, memory, rows=5)
    assert (need.trained, need.optimizer) == (4 * count, 12 * count)
    assert need.fast_weights == 2 * 5 * 4 * phi
    with pytest.raises(ValueError, match="needs at least"):
        fit.require(need, need.total - 1)
    fit.require(need, need.total)
    fit.require(need, None)

"""Scripts on model folders of every kind: what they refuse, and what they keep."""

import json
import shutil
from pathlib import Path

import pytest

from experiments import _model, convert, describe, finetune
from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.models.lora import LoraConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "backbones"
ADAPTER = GOLDEN / "lora_llada_dense"


class Settings:
    """What ``check_adapters`` reads of a fine-tuning config."""

    def __init__(self, lora):
        self.init, self.lora = str(ADAPTER), lora


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (None, "lora must be enabled, with rank=4 and alpha=8.0"),
        (LoraConfig(rank=8), "lora must be enabled, with rank=4"),
        (LoraConfig(rank=4, alpha=8.0), "other matrices than lora.target_modules=.*k_proj"),
    ],
)
def test_adapters_are_trained_on_as_they_are_or_not_at_all(lora, message):
    denoiser, theta = hugging_face.load(ADAPTER, base=GOLDEN / "llada_dense")
    with pytest.raises(ValueError, match=message):
        finetune.check_adapters(Settings(lora), denoiser, theta)
    fits = LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj"))
    finetune.check_adapters(Settings(fits), denoiser, theta)


def test_a_base_that_is_not_there_is_asked_for():
    with pytest.raises(FileNotFoundError, match=r"adapter on 'GSAI-ML/LLaDA-8B-Base'.*under"):
        _model.load(str(ADAPTER), "float32")


def test_a_base_under_a_whole_model_is_refused():
    with pytest.raises(ValueError, match=r"is for adapters, and .* holds none"):
        hugging_face.load(GOLDEN / "llada_dense", base="other")


def test_orbax_folders_are_told_apart(tmp_path):
    convert.main([str(GOLDEN / "llada_dense"), str(tmp_path / "orbax")])
    with pytest.raises(ValueError, match=r"holds Orbax arrays: python -m experiments\.convert"):
        hugging_face.load(tmp_path / "orbax")
    convert.main([str(tmp_path / "orbax"), str(tmp_path / "back")])
    before = json.loads((GOLDEN / "llada_dense" / "config.json").read_text())
    after = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {k: v for k, v in before.items() if after.get(k) != v} == {}


def test_merging_takes_the_memory_of_the_adapter_and_not_of_its_base(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(GOLDEN / "llada_dense", base)
    (base / "memory.json").write_text("{}")
    convert.main([str(ADAPTER), str(tmp_path / "merged"), f"--base={base}"])
    assert not (tmp_path / "merged" / "memory.json").exists()
    shutil.copytree(ADAPTER, tmp_path / "adapter")
    (tmp_path / "adapter" / "memory.json").write_text('{"rank": 4}')
    convert.main([str(tmp_path / "adapter"), str(tmp_path / "own"), f"--base={base}"])
    assert (tmp_path / "own" / "memory.json").read_text() == '{"rank": 4}'


def test_describe_takes_the_base_that_training_takes(capsys):
    describe.main(["llada_8b", "--lora-rank=32"])
    assert "parameters in float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling=.*unsupported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.*unsupported"),
        ({"n_layers": "3"}, "num_layers='3' must be a whole number"),
        ({"n_heads": None}, "num_heads=None must be a whole number"),
    ],
)
def test_settings_of_other_models_are_not_ignored(tmp_path, changes, message):
    config = json.loads((GOLDEN / "llada_dense" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        hugging_face.load(tmp_path)

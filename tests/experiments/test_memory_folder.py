"""A model folder remembers the memory that it was trained with."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import _memory, evaluate, generate
from experiments.configs import evaluate as evaluate_config
from experiments.configs import generate as generate_config
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.models.llada import LLaDA, LLaDAConfig

MODEL = LLaDA(LLaDAConfig(20, 8, 2, 2, 1, 12, mask_token_id=1, max_length=16))
MEMORY = MemoryConfig(rank=3, layer_fraction=0.5, learned=("rates", "start"), clip="none")


def test_settings_and_parameters_come_back(tmp_path):
    inner = InnerLoop(MODEL, MEMORY).init_learned(jax.random.key(0))
    _memory.save(tmp_path, MEMORY, inner)
    assert _memory.settings(str(tmp_path), {}) == MEMORY
    found = _memory.inner_parameters(str(tmp_path), MODEL, MEMORY)
    jax.tree.map(np.testing.assert_array_equal, found, inner)


def test_changes_are_those_that_are_not_none(tmp_path):
    _memory.save(tmp_path, MEMORY, None)
    changed = _memory.changes()
    assert _memory.settings(str(tmp_path), changed.to_dict()) == MEMORY
    changed.steps = 4
    assert _memory.settings(str(tmp_path), changed.to_dict()) == dataclasses.replace(
        MEMORY, steps=4
    )


def test_a_folder_trained_without_memory_has_the_papers(tmp_path, caplog):
    assert _memory.settings(str(tmp_path), {"steps": 3}) == MemoryConfig(steps=3)
    assert "has no memory.json" in caplog.text


def test_saving_removes_what_no_longer_holds(tmp_path):
    _memory.save(tmp_path, MEMORY, InnerLoop(MODEL, MEMORY).init_learned(jax.random.key(0)))
    _memory.save(tmp_path, None, None)
    assert list(tmp_path.iterdir()) == []


def test_missing_or_misshapen_parameters_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"inner_parameters\.safetensors is not there"):
        _memory.inner_parameters(str(tmp_path), MODEL, MEMORY)
    _memory.save(tmp_path, MEMORY, InnerLoop(MODEL, MEMORY).init_learned(jax.random.key(0)))
    other = dataclasses.replace(MEMORY, rank=2)
    with pytest.raises(ValueError, match="start/mlp/up_proj: file has float32"):
        _memory.inner_parameters(str(tmp_path), MODEL, other)


def test_evaluate_and_generate_take_the_folders_settings(tmp_path):
    _memory.save(tmp_path, MEMORY, None)
    config = evaluate_config.get_config()
    config.memdlm = str(tmp_path)
    config.memory.learning_rate = 0.3
    expected = dataclasses.replace(MEMORY, learning_rate=0.3)
    assert evaluate.from_config_dict(config).memory == expected
    config = generate_config.get_config()
    config.model, config.prompt = str(tmp_path), "hi"
    assert generate.from_config_dict(config).memory is None
    config.memory.enabled = True
    assert generate.from_config_dict(config).memory == MEMORY


def test_a_bad_change_is_named():
    config = evaluate_config.get_config()
    config.mdlm = "somewhere"
    config.memory.clip = "layer"
    with pytest.raises(ValueError, match=r"config\.memory.*clip='layer'"):
        evaluate.from_config_dict(config)

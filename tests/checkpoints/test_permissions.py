"""Whatever is written for a model can be read by those whom the user's umask lets read it."""

import os

import jax
import pytest

from experiments import _memory
from memdlm_jax import storage
from memdlm_jax.checkpoints import hugging_face, orbax_model, peft
from memdlm_jax.data.tokenizer import train_tokenizer
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.models import lora
from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.models.lora import LoraConfig

MODEL = LLaDA(LLaDAConfig(20, 8, 2, 2, 1, 12, mask_token_id=1, max_length=16))
MEMORY = MemoryConfig(rank=3, layer_fraction=0.5, learned=("rates", "start"), clip="none")


@pytest.fixture(params=[0o022, 0o027, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture(scope="module")
def theta():
    return MODEL.init(jax.random.key(0))


def assert_as_umask(folder, umask, *names):
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    assert set(names) <= set(found)
    for name, path in found.items():
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert oct(path.stat().st_mode & 0o777) == oct(expected), name


def test_files_of_a_model_folder(tmp_path, umask, theta):
    hugging_face.save(tmp_path, MODEL, theta)
    _memory.save(tmp_path, MEMORY, InnerLoop(MODEL, MEMORY).init_learned(jax.random.key(0)))
    train_tokenizer(["some words"], 290, whole_numbers=False).save(tmp_path / "tokenizer.json")
    assert_as_umask(
        tmp_path, umask, "model.safetensors", "config.json", "memory.json",
        "inner_parameters.safetensors", "tokenizer.json",
    )  # fmt: skip


def test_shards_and_their_index(tmp_path, umask, theta):
    hugging_face.save(tmp_path, MODEL, theta, shard_bytes=2000)
    assert_as_umask(tmp_path, umask, "model.safetensors.index.json")


def test_adapters(tmp_path, umask, theta):
    config = LoraConfig(rank=2, alpha=4.0)
    peft.save(tmp_path, MODEL, lora.add(jax.random.key(0), MODEL, theta, config), config)
    assert_as_umask(tmp_path, umask, "adapter_model.safetensors", "adapter_config.json")


def test_an_orbax_model(tmp_path, umask, theta):
    orbax_model.save(tmp_path, MODEL, theta)
    assert_as_umask(tmp_path, umask, "config.json")


def test_a_file_that_is_replaced(tmp_path, umask):
    file = tmp_path / "file"
    file.touch(0o600)
    with storage.replacing(file) as new:
        new.touch(0o600)
    assert_as_umask(tmp_path, umask, "file")

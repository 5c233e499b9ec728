"""A model folder's memory: the settings it was trained with, and a learned inner loop."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import safetensors
from ml_collections import config_dict

from experiments import _cli
from memdlm_jax import storage
from memdlm_jax.checkpoints import hugging_face, trees
from memdlm_jax.evaluation import spectrum
from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop, InnerParameters
from memdlm_jax.typing import Denoiser, Phi

logger = logging.getLogger(__name__)

SETTINGS = "memory.json"
PARAMETERS = "inner_parameters.safetensors"


def save(folder: Path, memory: MemoryConfig | None, inner: InnerParameters | None) -> None:
    """Write what a later reader of the model folder must know; removes what no longer holds."""
    for name, content in ((SETTINGS, memory), (PARAMETERS, inner)):
        if content is None:
            (folder / name).unlink(missing_ok=True)
    if memory is not None:
        text = json.dumps(dataclasses.asdict(memory), indent=1)
        (folder / SETTINGS).write_text(text + "\n")
    if inner is not None:
        trees.save(folder / PARAMETERS, inner)


def inner_digest(folder: str) -> str:
    """Sha256 of the learned inner loop of a model folder.

    Raises:
        FileNotFoundError: it has none.
    """
    return hashlib.sha256((storage.path(folder) / PARAMETERS).read_bytes()).hexdigest()


def save_written(path: str, phi: Phi, memory: MemoryConfig, model: str, under: str = "") -> None:
    """Write a memory of one group, and beside it (``.json``) what it must be read with."""
    trees.save(path, phi)
    facts = {"weights": _digest(model, under), "memory": dataclasses.asdict(memory)}
    storage.path(f"{path}.json").write_text(json.dumps(facts, indent=1) + "\n")


def written_settings(path: str) -> MemoryConfig:
    """The settings that a memory was written with.

    Raises:
        FileNotFoundError: there is no such memory.
        KeyError, TypeError, ValueError: the file beside it is damaged.
    """
    file = storage.path(f"{path}.json")
    if not file.exists():
        raise FileNotFoundError(f"{file} is not there: it is written by save_memory, with {path}")
    return _cli.build(MemoryConfig, _facts(file)["memory"], str(file))


def _facts(file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not (isinstance(facts, dict) and {"weights", "memory"} <= facts.keys()):
        raise ValueError(f"{file} must have 'weights' and 'memory', as save_memory writes it")
    return facts


def load_written(
    path: str, denoiser: Denoiser, memory: MemoryConfig, model: str, under: str = ""
) -> Phi:
    """A memory that ``save_written`` wrote.

    Raises:
        ValueError: it was written with other weights, or has other shapes.
    """
    if _facts(storage.path(f"{path}.json"))["weights"] != _digest(model, under):
        raise ValueError(
            f"{path} was written with other weights than those of {model}: a memory is a change "
            "to these very weights"
        )
    template = jax.eval_shape(
        lambda key: fast_weights.init(key, denoiser, memory, 1), jax.random.key(0)
    )
    return trees.load(path, template)


def written_lines(path: str) -> Iterator[str]:
    """What a saved memory changes, one line per matrix and layer; no model is needed.

    Raises:
        FileNotFoundError, ValueError: see ``written_settings``; or it cannot be read.
    """
    memory = written_settings(path)
    try:
        with (
            storage.on_disk(path) as local,
            safetensors.safe_open(local, framework="flax") as file,
        ):
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    flat: dict[str, Any] = {}
    for name, array in arrays.items():
        above, leaf = name.rsplit("/", 1)
        if leaf == "W":
            flat[above] = fast_weights.Dense(array)
        elif leaf == "A":
            scale = memory.alpha / memory.rank
            flat[above] = fast_weights.LowRank(array, arrays[f"{above}/B"], scale)
    phi = flax.traverse_util.unflatten_dict(flat, sep="/")
    yield f"{sum(a.size for a in arrays.values()):,} fast weights, written with {memory}"
    for name, found in spectrum.describe(phi).items():
        for layer, (norm, rank) in enumerate(zip(found["norm"][0], found["rank"][0], strict=True)):
            # Of experts the mean.
            yield (
                f"{name}, adapted layer {layer}: norm of the change {jnp.mean(norm):.4g}, "
                f"effective rank {jnp.mean(rank):.2f}"
            )


def _digest(model: str, under: str) -> str:
    return hugging_face.weights_digest(model, under or None)


def defaults() -> config_dict.ConfigDict:
    """The ``memory`` section of scripts that train: all settings, as the paper has them."""
    return config_dict.ConfigDict(dataclasses.asdict(MemoryConfig()))


def changes() -> config_dict.ConfigDict:
    """The ``memory`` section of scripts that use a trained model: ``None`` is as it was trained."""
    kinds = {name: type(value) for name, value in dataclasses.asdict(MemoryConfig()).items()}
    return config_dict.ConfigDict(
        {name: config_dict.placeholder(kind) for name, kind in kinds.items()}
    )


def settings(folder: str, changed: Mapping[str, Any]) -> MemoryConfig:
    """A model folder's memory settings, with changes that are not ``None``.

    A folder without ``memory.json`` was not trained with memory: the paper's settings hold.

    Raises:
        KeyError, TypeError, ValueError: naming the field, see ``_cli.build``.
    """
    file = storage.path(folder) / SETTINGS
    trained = {}
    if folder and file.exists():
        trained = json.loads(file.read_text())
    elif folder:
        logger.warning("%s has no %s: memory settings are the paper's", folder, SETTINGS)
    wanted = {name: value for name, value in changed.items() if value is not None}
    return _cli.build(MemoryConfig, trained | wanted, "config.memory")


def inner_parameters(
    folder: str, denoiser: Denoiser, memory: MemoryConfig
) -> InnerParameters | None:
    """The learned inner loop of a model folder, ``None`` if the memory learns nothing.

    Raises:
        FileNotFoundError: the memory names learned parts, and the folder has none.
        ValueError: what is there has other shapes.
    """
    if not memory.learned:
        return None
    file = storage.path(folder) / PARAMETERS
    if not file.exists():
        raise FileNotFoundError(
            f"memory.learned={memory.learned!r}, but {file} is not there: train with it first"
        )
    template = jax.eval_shape(InnerLoop(denoiser, memory).init_learned, jax.random.key(0))
    return trees.load(file, template)

"""A model folder's memory: the settings it was trained with, and a learned inner loop."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import config_dict

from experiments import _cli
from memdlm_jax.checkpoints import trees
from memdlm_jax.memory import learned
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.learned import InnerParameters
from memdlm_jax.typing import Denoiser

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
    file = Path(folder) / SETTINGS
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
    file = Path(folder) / PARAMETERS
    if not file.exists():
        raise FileNotFoundError(
            f"memory.learned={memory.learned!r}, but {file} is not there: train with it first"
        )
    template = jax.eval_shape(lambda key: learned.init(key, denoiser, memory), jax.random.key(0))
    return trees.load(file, template)

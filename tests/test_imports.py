"""Who may import whom: data flows from top to bottom through the rooms of the house."""

import ast
from pathlib import Path

import pytest

import memdlm_jax

ROOT = Path(memdlm_jax.__file__).parent

# Room -> the other rooms it may import, in the order of the house. Diffusion knows no memory,
# memory no backbone, a backbone no training.
MAY_IMPORT = {
    "typing": set(),
    "registry": set(),
    "parameters": {"typing"},
    "partitioning": set(),
    "processes": set(),
    "storage": set(),
    "progress": {"processes"},
    "diffusion": {"typing", "registry", "partitioning"},
    "memory": {"typing", "registry", "parameters", "partitioning", "diffusion"},
    "inference": {"typing", "partitioning", "diffusion", "memory"},
    "models": {"typing", "registry", "parameters", "partitioning"},
    "checkpoints": {"typing", "registry", "parameters", "processes", "storage", "models"},
    "data": {"typing", "registry", "storage", "progress"},
    "training": {
        "typing",
        "registry",
        "parameters",
        "partitioning",
        "processes",
        "storage",
        "progress",
        "diffusion",
        "memory",
        "inference",
        "checkpoints",
        "data",
    },
    "evaluation": {
        "typing",
        "registry",
        "parameters",
        "processes",
        "storage",
        "progress",
        "diffusion",
        "memory",
        "inference",
        "models",
        "data",
    },
}
# A config arrives as frozen dataclasses; PyTorch and TensorFlow are no dependencies.
NEVER = {"experiments", "absl", "ml_collections", "torch", "tensorflow"}


def imported(source, package):
    """Full dotted names that a module of ``package`` imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: 1 - node.level or None] if node.level else []
            names = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*names, alias.name]) for alias in node.names)


def violations(source, room, package):
    """The imports that the rules forbid to a module of ``room``."""
    found = []
    for name in imported(source, package):
        top, *rest = name.split(".")
        inside = top == "memdlm_jax" and rest and rest[0] != room
        if top in NEVER or (inside and rest[0] not in MAY_IMPORT[room]):
            found.append(name)
    return found


def modules():
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_module_imports_only_the_rooms_above_it(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = ".".join(["memdlm_jax", *parts[:-1]])
    assert parts[0] in MAY_IMPORT, f"room {parts[0]} stands in no table"
    assert violations(path.read_text(), parts[0], package) == []


def test_rooms_stand_in_order():
    rooms = list(MAY_IMPORT)
    for place, (room, allowed) in enumerate(MAY_IMPORT.items()):
        assert allowed <= set(rooms[:place]), room
    assert set(rooms) <= {path.stem for path in ROOT.iterdir()}


@pytest.mark.parametrize(
    "source",
    [
        "from memdlm_jax.models import llada",
        "from memdlm_jax.models.llada import LLaDA",
        "from memdlm_jax import typing, training",
        "import memdlm_jax.data.sft as sft",
        "from ..models import llada",
        "from .. import data",
        "def late():\n    import torch.nn",
        "import ml_collections",
        "from absl import logging",
        "from experiments import pretrain",
    ],
)
def test_the_check_sees(source):
    assert violations(source, "memory", "memdlm_jax.memory")


@pytest.mark.parametrize(
    "source",
    [
        "from memdlm_jax.memory import inner_loop",
        "from memdlm_jax.diffusion import masking",
        "from memdlm_jax.typing import Batch",
        "from . import config",
        "from .config import MemoryConfig",
        "import jax.numpy as jnp, tensorflow_datasets",
    ],
)
def test_the_check_allows(source):
    assert not violations(source, "memory", "memdlm_jax.memory")

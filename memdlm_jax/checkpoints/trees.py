"""Any pytree of arrays as one safetensors file, its leaves under slash-separated names."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import safetensors
from safetensors.flax import save_file

from memdlm_jax import storage


def save(path: str | Path, tree: Any) -> None:
    """Write the tree's leaves, each in its own dtype; replaces the file."""
    with storage.replacing(storage.path(path)) as file:
        save_file({name: jnp.asarray(leaf) for name, leaf in named(tree).items()}, file)


def load(path: str | Path, template: Any) -> Any:
    """Read a tree back.

    Args:
        path: what ``save`` wrote.
        template: pytree of arrays or ``jax.ShapeDtypeStruct`` with the structure, shapes and
            dtypes that the result must have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or names, shapes or dtypes differ; lists all.
    """
    try:
        with (
            storage.on_disk(path) as local,
            safetensors.safe_open(local, framework="flax") as file,
        ):
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    wanted = named(template)
    wrong = [
        f"{name}: file has {_describe(found.get(name))}, must be {_describe(wanted.get(name))}"
        for name in sorted(found.keys() | wanted.keys())
        if _describe(found.get(name)) != _describe(wanted.get(name))
    ]
    if wrong:
        raise ValueError(f"{path} does not fit: " + "; ".join(wrong))
    leaves = [found[name] for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def named(tree: Any) -> dict[str, Any]:
    """Slash-separated path -> leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def _describe(leaf: Any) -> str:
    return "none" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"

"""A model as Orbax keeps it: restored in parallel onto any sharding, every array verified.

A folder holds ``config.json`` in the published format and the arrays, with our own digests, under
``orbax``.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import jax

from memdlm_jax import storage
from memdlm_jax.checkpoints import families, hugging_face
from memdlm_jax.checkpoints.folders import read_json
from memdlm_jax.checkpoints.hugging_face import Sharding
from memdlm_jax.checkpoints.training_state import TrainingCheckpoints
from memdlm_jax.checkpoints.trees import named
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.typing import Theta

ARRAYS = "orbax"


def is_orbax(folder: str | Path) -> bool:
    """Whether a folder is what ``save`` writes."""
    return (storage.path(folder) / ARRAYS).is_dir()


def save(
    folder: str | Path, denoiser: Transformer, theta: Theta, *, like: str | Path | None = None
) -> None:
    """Write a model.

    Args:
        folder: made if missing; must not hold a model of this kind yet.
        denoiser: gives the config.
        theta: base parameters, arrays of one dtype, stored in it.
        like: a model folder whose further config fields are kept.

    Raises:
        FileExistsError: there is a model already.
        ValueError: a leaf of theta is quantised or carries an adapter, or dtypes differ.
    """
    folder = storage.path(folder)
    if is_orbax(folder):
        raise FileExistsError(f"{folder / ARRAYS} exists; remove it or choose another folder")
    hugging_face.require_arrays(theta)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(theta)}
    if len(dtypes) > 1:
        raise ValueError(f"theta has leaves of {sorted(dtypes)}, must have one dtype")
    with contextlib.closing(TrainingCheckpoints(folder / ARRAYS, {}, keep_last=1)) as arrays:
        arrays.save(0, theta, position=0)
        arrays.wait()
    published = families.published_config(denoiser, dtypes.pop(), like)
    with storage.replacing(folder / "config.json") as file:
        file.write_text(json.dumps(published, indent=2, sort_keys=True) + "\n")


def load(
    folder: str | Path,
    dtype: str | None = None,
    *,
    sharding: Sharding | None = None,
    **changes: Any,
) -> tuple[Transformer, Theta]:
    """Read a model back, in the dtype it was stored in.

    Args:
        folder: what ``save`` wrote.
        dtype: dtype of the activations; ``None`` is that of the parameters.
        sharding: where each leaf lies; ``None`` is the default device.
        **changes: further fields of the model's config.

    Raises:
        FileNotFoundError: it is no such folder.
        CorruptCheckpoint: an array is not what was written.
        ConfigMismatch: the arrays are not those of ``config.json``.
    """
    folder = storage.path(folder)
    config = folder / "config.json"
    published = read_json(config)
    if not is_orbax(folder):
        raise FileNotFoundError(f"{folder / ARRAYS} is missing: {folder} holds no Orbax model")
    stored = published["torch_dtype"]
    denoiser = families.denoiser_of(
        published, config, dtype=dtype or stored, param_dtype=stored, **changes
    )
    template = jax.eval_shape(denoiser.init, jax.random.key(0))
    if sharding is not None:
        places = {name: sharding(name, leaf.shape) for name, leaf in named(template).items()}
        leaves = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name])
            for name, leaf in named(template).items()
        ]
        template = jax.tree.unflatten(jax.tree.structure(template), leaves)
    with contextlib.closing(TrainingCheckpoints(folder / ARRAYS, {})) as arrays:
        return denoiser, arrays.restore(0, template).state

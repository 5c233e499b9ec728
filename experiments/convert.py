"""Convert a model folder between the published format and Orbax; merge an adapter on the way.

    python -m experiments.convert SOURCE TARGET [--to=orbax|hugging_face] [--base=FOLDER]
        [--dtype=float32|bfloat16|float16] [--shard-bytes=N]

SOURCE holds safetensors in the published format (``ORG/NAME@REVISION`` is downloaded first), a PEFT
adapter (merged into its base: the one that it names, or ``--base``), or Orbax arrays. Without
``--to`` the published format becomes Orbax, and the other two the published format. Weights keep
their dtype, the widest where there are several, unless ``--dtype`` says otherwise. Tokenizer and
other small files are copied.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from memdlm_jax import storage
from memdlm_jax.checkpoints import hub, hugging_face, orbax_model
from memdlm_jax.checkpoints.training_state import CorruptCheckpoint, NoUsableCheckpoint
from memdlm_jax.models import lora
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.progress import Progress
from memdlm_jax.typing import Theta

# What belongs to a model folder beside config and weights.
SMALL = ("*token*.json", "vocab.json", "merges.txt", "*.jinja", "generation_config.json")
MEMORY = ("memory.json", "inner_parameters.safetensors")
FORMATS = ("orbax", "hugging_face")


def load(source: Path, base: Path | None, dtype: str | None) -> tuple[Transformer, Theta]:
    """A model of any kind of folder, adapters merged, in its own dtype or another.

    Raises:
        FileNotFoundError, ValueError: see the loaders of ``memdlm_jax.checkpoints``.
    """
    if orbax_model.is_orbax(source):
        denoiser, theta = orbax_model.load(source)
        if dtype is None:
            return denoiser, theta
        theta = jax.tree.map(lambda leaf: leaf.astype(dtype), theta)
        return denoiser.with_config(dtype=dtype, param_dtype=dtype), theta
    stored = dtype or hugging_face.stored_dtype(source, base)
    denoiser, theta = hugging_face.load(source, stored, base=base)
    return denoiser, lora.merge(theta)


def convert(
    source: Path, target: Path, to: str | None, base: Path | None, dtype: str | None, shard: int
) -> str:
    """Convert and return the format written.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: naming the folder.
    """
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty; choose another folder")
    whole = not orbax_model.is_orbax(source) and not hugging_face.is_adapter(source)
    to = to or ("orbax" if whole else "hugging_face")
    denoiser, theta = load(source, base, dtype)
    below = hugging_face.base_of(source, base)
    if to == "orbax":
        orbax_model.save(target, denoiser, theta, like=below)
    else:
        hugging_face.save(target, denoiser, theta, like=below, shard_bytes=shard)
    # What memory a model was trained with is the adapter's business, not its base's.
    for folder, patterns in ((below, SMALL), (source, (*SMALL, *MEMORY))):
        for pattern in patterns:
            for file in folder.glob(pattern):
                (target / file.name).write_bytes(file.read_bytes())
    return to


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.convert",
        description="Convert a model folder between the published format and Orbax.",
    )
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--to", choices=FORMATS)
    parser.add_argument("--base", help="model folder under an adapter")
    parser.add_argument("--dtype", choices=hugging_face.DTYPES)
    parser.add_argument("--shard-bytes", type=int, default=hugging_face.SHARD_BYTES)
    o = parser.parse_args(arguments)
    logging.basicConfig()
    logging.getLogger("memdlm_jax.progress").setLevel(logging.INFO)
    if o.shard_bytes < 1:
        parser.error(f"--shard-bytes={o.shard_bytes} must be at least 1")
    try:
        source, target = storage.path(hub.local(o.source)), storage.path(o.target)
        base = o.base and storage.path(o.base)
        with Progress(f"converting {o.source}", unit=""):
            to = convert(source, target, o.to, base, o.dtype, o.shard_bytes)
    except (OSError, ImportError, ValueError, CorruptCheckpoint, NoUsableCheckpoint) as error:
        sys.exit(f"error: {error}")
    print(f"{o.target}: {to}")


if __name__ == "__main__":
    main()

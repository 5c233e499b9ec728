"""Read and write model folders in the published format: ``config.json``, ``*.safetensors``.

No code of a checkpoint is ever run and no pickle is ever read. Tensors are read one at a time.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.flax import save_file

from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.typing import Theta

ARCHITECTURES = ("LLaDAModelLM",)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("float32", "bfloat16", "float16")
_BLOCK = "model.transformer.blocks.{}."
# Our path inside a layer -> (published name inside a block, whether it is a transposed matrix).
_LAYER = {
    ("attention_norm", "scale"): ("attn_norm.weight", False),
    ("attention", "q_proj", "kernel"): ("q_proj.weight", True),
    ("attention", "k_proj", "kernel"): ("k_proj.weight", True),
    ("attention", "v_proj", "kernel"): ("v_proj.weight", True),
    ("attention", "o_proj", "kernel"): ("attn_out.weight", True),
    ("mlp_norm", "scale"): ("ff_norm.weight", False),
    ("mlp", "gate_proj", "kernel"): ("ff_proj.weight", True),
    ("mlp", "up_proj", "kernel"): ("up_proj.weight", True),
    ("mlp", "down_proj", "kernel"): ("ff_out.weight", True),
}
_TOP = {
    ("embedding",): ("model.transformer.wte.weight", False),
    ("final_norm", "scale"): ("model.transformer.ln_f.weight", False),
    ("unembedding",): ("model.transformer.ff_out.weight", True),
}
# Settings of the published config that change the computation, and the only value we compute.
_FIXED = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "rope": True,
    "scale_logits": False,
}


def load(folder: str | Path, dtype: str = "float32") -> tuple[LLaDA, Theta]:
    """Load a dense LLaDA from a local folder.

    Args:
        folder: holds ``config.json`` and one ``model.safetensors``, or shards with
            ``model.safetensors.index.json``.
        dtype: dtype of parameters and activations, ``float32`` or ``bfloat16``.

    Returns:
        (denoiser, theta).

    Raises:
        FileNotFoundError: if the folder or a file of it is missing.
        ValueError: if the architecture or a setting is not supported, or if tensors are missing,
            unexpected or misshapen (all of them are listed).
    """
    folder = Path(folder)
    denoiser = LLaDA(_read_config(folder, dtype))
    expected = jax.eval_shape(denoiser.init, jax.random.key(0))
    names = dict(_names(denoiser.config))
    found = _open(folder)
    _check(folder, expected, names, found)

    def tensor(name: str, transposed: bool) -> np.ndarray:
        array = found[name].get_tensor(name)
        return array.T if transposed else array

    def leaf(path: tuple[str, ...], shape) -> jax.Array:
        if path[0] != "layers":
            return jnp.asarray(tensor(*names[path]), dtype)
        stack = np.empty(shape.shape, jnp.dtype(dtype))
        for i in range(denoiser.num_layers):
            stack[i] = tensor(*names[(*path, i)])
        return jnp.asarray(stack)

    return denoiser, jax.tree_util.tree_map_with_path(lambda p, s: leaf(_keys(p), s), expected)


def save(folder: str | Path, denoiser: LLaDA, theta: Theta) -> None:
    """Write theta as a folder that ``load`` and the published modelling code read.

    Files appear whole or not at all. The shards of a model that was there before are removed with
    their index, which would else stay in force.

    Args:
        folder: made if missing; ``config.json`` and ``model.safetensors`` in it are replaced.
        denoiser: gives the config.
        theta: base parameters, stored in their own dtype.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Any] = {}
    for path, (name, transposed) in _names(denoiser.config):
        array = np.asarray(_get(theta, path))
        tensors[name] = np.ascontiguousarray(array.T if transposed else array)
    config = json.dumps(_published_config(denoiser.config, theta), indent=2, sort_keys=True)
    with _replacing(folder / _WEIGHTS) as weights, _replacing(folder / "config.json") as settings:
        save_file(tensors, weights, metadata={"format": "pt"})
        settings.write_text(config + "\n")
    _remove_shards(folder)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of ``path`` if all goes well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_shards(folder: Path) -> None:
    """Remove an index, and the files in the folder itself that it names."""
    index = folder / _INDEX
    if not index.exists():
        return
    stale = set(json.loads(index.read_text())["weight_map"].values()) - {_WEIGHTS}
    index.unlink()
    for name in stale:
        if Path(name).name == name and name.endswith(".safetensors"):
            (folder / name).unlink(missing_ok=True)


def weights_digest(folder: str | Path) -> str:
    """Sha256 of the files that ``load`` reads theta from, for telling starting weights apart.

    Raises:
        FileNotFoundError: one of them is missing.
    """
    weights = hashlib.sha256()
    for file in _weight_files(Path(folder)):
        with file.open("rb") as content:
            weights.update(hashlib.file_digest(content, "sha256").digest())
    return weights.hexdigest()


def _names(config: LLaDAConfig) -> Iterator[tuple[tuple, tuple[str, bool]]]:
    """Pairs of our path (layer index last) and (published name, transposed)."""
    for path, entry in _TOP.items():
        if not (config.tied and path == ("unembedding",)):
            yield path, entry
    for path, (name, transposed) in _LAYER.items():
        for i in range(config.num_layers):
            yield ("layers", *path, i), (_BLOCK.format(i) + name, transposed)


def _keys(path) -> tuple[str, ...]:
    return tuple(entry.key for entry in path)


def _get(tree, path: tuple):
    for part in path:
        tree = tree[part]
    return tree


def _weight_files(folder: Path) -> list[Path]:
    """The one file of a folder, or its shards, by name."""
    index = folder / _INDEX
    files = [folder / _WEIGHTS]
    if index.exists():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        files = [folder / name for name in sorted(shards)]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: a model folder holds safetensors weights")
    return files


def _open(folder: Path) -> dict[str, safetensors.safe_open]:
    """Map every tensor name to its opened file."""
    opened = [_open_file(file) for file in _weight_files(folder)]
    return {name: handle for handle in opened for name in handle.keys()}  # noqa: SIM118


def _open_file(file: Path) -> safetensors.safe_open:
    try:
        return safetensors.safe_open(file, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error


def _check(folder: Path, expected, names: dict, found: dict) -> None:
    """Raise one error that lists every missing, unexpected and misshapen tensor."""
    problems = []
    for path, (name, transposed) in names.items():
        whole = path[:-1] if path[0] == "layers" else path
        shape = _get(expected, whole).shape[len(path) - len(whole) :]
        shape = shape[::-1] if transposed else shape
        if name not in found:
            problems.append(f"missing {name} {list(shape)}")
        elif (got := found[name].get_slice(name).get_shape()) != list(shape):
            problems.append(f"{name} has shape {got}, expected {list(shape)}")
    known = {name for name, _ in names.values()}
    problems += [f"unexpected {name}" for name in sorted(set(found) - known)]
    if problems:
        raise ValueError(f"{folder} does not fit its config.json:\n  " + "\n  ".join(problems))


def _read_config(folder: Path, dtype: str) -> LLaDAConfig:
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: a model folder holds config.json and weights")
    published = json.loads(file.read_text())
    architectures = published.get("architectures") or []
    if not set(architectures) & set(ARCHITECTURES):
        raise ValueError(f"{file}: architectures={architectures} must be one of {ARCHITECTURES}")
    for name, value in _FIXED.items():
        if published.get(name, value) != value:
            raise ValueError(f"{file}: {name}={published[name]!r} is unsupported, only {value!r}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {_DTYPES}")
    try:
        return _our_config(published, dtype)
    except KeyError as error:
        raise ValueError(f"{file}: the field {error} is missing") from None


def _our_config(published: dict, dtype: str) -> LLaDAConfig:
    return LLaDAConfig(
        vocab_size=published.get("embedding_size") or published["vocab_size"],
        width=published["d_model"],
        num_layers=published["n_layers"],
        num_heads=published["n_heads"],
        num_kv_heads=published.get("n_kv_heads") or published["n_heads"],
        hidden_features=published["mlp_hidden_size"],
        mask_token_id=published["mask_token_id"],
        max_length=published["max_sequence_length"],
        rope_theta=published["rope_theta"],
        norm_epsilon=published["rms_norm_eps"],
        tied=published.get("weight_tying", False),
        dtype=dtype,
        param_dtype=dtype,
    )


def _published_config(config: LLaDAConfig, theta: Theta) -> dict:
    return _FIXED | {
        "architectures": [ARCHITECTURES[0]],
        "model_type": "llada",
        "bias_for_layer_norm": False,
        "d_model": config.width,
        "embedding_size": config.vocab_size,
        "mask_token_id": config.mask_token_id,
        "max_sequence_length": config.max_length,
        "mlp_hidden_size": config.hidden_features,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "n_layers": config.num_layers,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "torch_dtype": theta["embedding"].dtype.name,
        "vocab_size": config.vocab_size,
        "weight_tying": config.tied,
    }

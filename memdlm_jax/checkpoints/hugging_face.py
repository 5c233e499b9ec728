"""Read and write model folders in the published format: ``config.json``, ``*.safetensors``.

No code of a checkpoint is ever run and no pickle is ever read. Weights go to the device in pieces:
the host holds one piece, and never a whole large leaf.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.flax import save_file

from memdlm_jax import storage
from memdlm_jax.checkpoints import families, hub, peft, weights
from memdlm_jax.checkpoints.families import Entry
from memdlm_jax.checkpoints.folders import read_json
from memdlm_jax.checkpoints.weights import INDEX, WEIGHTS, Stored
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.typing import Theta

DTYPES = ("float32", "bfloat16", "float16")
PIECE_BYTES = 32 << 20
SHARD_BYTES = 5_000_000_000

Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""(slash-separated path of a leaf, its shape) -> where it lies."""

Transform = Callable[[str, jax.Array], Any]
"""(path, matrices [..., in, out]) -> what takes their place in theta (a quantised matrix).

It must treat columns, and what stands on leading axes, one by one: it is given parts of them."""


def load(
    folder: str | Path,
    dtype: str = "float32",
    param_dtype: str | None = None,
    *,
    base: str | Path | None = None,
    sharding: Sharding | None = None,
    transform: Transform | None = None,
    piece_bytes: int = PIECE_BYTES,
    **changes: Any,
) -> tuple[Transformer, Theta]:
    """Load a published model, or a PEFT adapter and the model under it.

    Args:
        folder: holds ``config.json`` and one ``model.safetensors``, or shards with
            ``model.safetensors.index.json``, in float32, bfloat16 or float16; or
            ``adapter_config.json`` and ``adapter_model.safetensors``.
        dtype: dtype of the activations, ``float32``, ``bfloat16`` or ``float16``.
        param_dtype: dtype of the parameters; ``None`` is ``dtype``.
        base: model folder under an adapter; ``None`` is the one that the adapter names.
        sharding: where each leaf of the model lies; ``None`` is the default device.
        transform: applied to every matrix but the embeddings, piece by piece, on the device.
        piece_bytes: largest piece that is read at a time.
        **changes: further fields of the model's config (``mask_token_id``, ``remat``).

    Returns:
        (denoiser, theta); an adapter stands in theta, see ``models.lora``.

    Raises:
        FileNotFoundError: if the folder or a file of it is missing.
        ValueError: if the architecture or a setting is not supported, or if tensors are missing,
            unexpected, misshapen or of another dtype (all of them are listed).
    """
    folder = storage.path(folder)
    for name, value in (("dtype", dtype), ("param_dtype", param_dtype or dtype)):
        if value not in DTYPES:
            raise ValueError(f"{name}={value!r} must be one of {DTYPES}")
    if is_adapter(folder):
        below = base_of(folder, base)
        denoiser, theta = load(
            below, dtype, param_dtype, sharding=sharding, transform=transform,
            piece_bytes=piece_bytes, **changes,
        )  # fmt: skip
        return denoiser, peft.load(folder, denoiser, theta)[0]
    if base is not None:
        raise ValueError(f"base={base} is for adapters, and {folder} holds none")
    if (folder / "orbax").is_dir():
        raise ValueError(f"{folder} holds Orbax arrays: python -m experiments.convert it first")
    config = folder / "config.json"
    denoiser = families.denoiser_of(
        read_json(config), config, dtype=dtype, param_dtype=param_dtype or dtype, **changes
    )
    found = weights.contents(weights.files(folder))
    placed = _placed(folder, denoiser, found)
    return denoiser, _Loading(denoiser, sharding, transform, piece_bytes).run(found, placed)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter instead of a whole model."""
    return (storage.path(folder) / peft.CONFIG).exists()


def base_of(folder: str | Path, base: str | Path | None = None) -> Path:
    """The model folder under an adapter's: ``base``, or the one that the adapter names.

    A relative name is looked for in the working directory, then in the adapter's folder. A folder
    that holds no adapter is its own base.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not is_adapter(folder):
        return storage.path(folder)
    name = storage.path(hub.local(str(base or peft.base_of(folder))))
    for found in (name, storage.path(folder) / name):
        if (found / "config.json").exists():
            return found
    raise FileNotFoundError(
        f"{folder} is an adapter on {str(name)!r}, which is no model folder here: say where its "
        "base lies (base; on the command line --base or --config.under)"
    )


def _placed(folder: Path, denoiser: Transformer, found: Mapping[str, Stored]) -> dict[str, Entry]:
    """Published name -> where it goes; one error lists all that does not fit."""
    placed = {e.name: e for e in families.entries(denoiser, found.__contains__)}
    shapes = _shapes(denoiser)
    problems = []
    for name, entry in placed.items():
        shape = shapes[entry.path][len(entry.place) :]
        shape = (*shape[:-2], *shape[:-3:-1]) if entry.transposed else shape
        if name not in found:
            problems.append(f"missing {name} {list(shape)}")
        elif found[name].shape != shape:
            problems.append(f"{name} has shape {list(found[name].shape)}, expected {list(shape)}")
        elif not found[name].supported:
            problems.append(f"{name} has dtype {found[name].dtype}, expected F32, BF16 or F16")
    problems += [f"unexpected {name}" for name in sorted(set(found) - set(placed))]
    if problems:
        raise ValueError(f"{folder} does not fit its config.json:\n  " + "\n  ".join(problems))
    return placed


def _shapes(denoiser: Transformer) -> dict[str, tuple[int, ...]]:
    """Slash-separated path -> shape of every leaf of theta."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(denoiser.init, jax.random.key(0)))
    return {_joined(path): leaf.shape for path, leaf in leaves}


def _joined(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


class _Loading:
    """The leaves of theta on their way from the files to the devices."""

    def __init__(self, denoiser, sharding, transform, piece_bytes: int):
        self._template = jax.eval_shape(denoiser.init, jax.random.key(0))
        self._shapes = _shapes(denoiser)
        self._dtype = jnp.dtype(denoiser.config.param_dtype)
        self._sharding, self._transform, self._largest = sharding, transform, piece_bytes
        self._leaves: dict[str, Any] = {}

    def run(self, found: Mapping[str, Stored], placed: Mapping[str, Entry]) -> Theta:
        """Read file after file, in the order of its bytes."""
        left = {path: 0 for path in self._shapes}
        for entry in placed.values():
            left[entry.path] += 1
        for name, stored in found.items():
            path = placed[name].path
            for first, piece in stored.pieces(self._largest):
                self._put(placed[name], first, piece)
            left[path] -= 1
            if not left[path] and isinstance(self._leaves[path], np.ndarray):
                self._leaves[path] = self._to_device(path, self._leaves.pop(path))
        leaves = [self._leaves[path] for path in self._shapes]
        return jax.tree.unflatten(jax.tree.structure(self._template), leaves)

    def _put(self, entry: Entry, first: int, piece: np.ndarray) -> None:
        """Write one piece: small leaves are put together on the host, large ones on the device."""
        path = entry.path
        shape = self._shapes[path]
        if path not in self._leaves:
            small = int(np.prod(shape)) * self._dtype.itemsize <= self._largest
            self._leaves[path] = np.empty(shape, self._dtype) if small else self._empty(path)
        leaf = self._leaves[path]
        start = _start(shape, entry, first)
        if not isinstance(leaf, np.ndarray):
            leaf = self._writer(path, entry.transposed)(leaf, piece, start)
            # Else pieces would be read faster than they are written, and wait on the host.
            self._leaves[path] = jax.block_until_ready(leaf)
            return
        piece = np.swapaxes(piece, -1, -2) if entry.transposed else piece
        whole = (*(1,) * len(entry.place), *piece.shape)
        window = tuple(slice(a, a + n) for a, n in zip(start, whole, strict=True))
        leaf[window] = piece.reshape(whole)

    def _changed(self, path: str, matrices: jax.Array) -> Any:
        """Matrices in the parameters' dtype, or what takes their place."""
        matrices = matrices.astype(self._dtype)
        wanted = self._transform is not None and path.endswith("/kernel")
        return self._transform(path, matrices) if wanted else matrices

    def _where(self, path: str) -> jax.sharding.Sharding | None:
        return None if self._sharding is None else self._sharding(path, self._shapes[path])

    def _to_device(self, path: str, leaf: np.ndarray) -> Any:
        where = self._where(path)
        return jax.jit(functools.partial(self._changed, path), out_shardings=where)(leaf)

    def _empty(self, path: str) -> Any:
        shape = jax.ShapeDtypeStruct(self._shapes[path], self._dtype)
        made = jax.eval_shape(functools.partial(self._changed, path), shape)

        def zeros():
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), made)

        return jax.jit(zeros, out_shardings=self._where(path))()

    @functools.cache  # noqa: B019 (an instance lives for one load)
    def _writer(self, path: str, transposed: bool) -> Callable:
        """A compiled function that writes a piece into a leaf in place."""

        def write(leaf, piece, start):
            piece = jnp.swapaxes(piece, -1, -2) if transposed else piece
            missing = len(self._shapes[path]) - piece.ndim
            made = self._changed(path, piece.reshape((*(1,) * missing, *piece.shape)))
            # A stand-in's leaves have their own sizes along ``in``, which is never cut.
            return jax.tree.map(lambda old, new: _written(old, new, start), leaf, made)

        return jax.jit(write, donate_argnums=0, out_shardings=self._where(path))


def _written(leaf: jax.Array, piece: jax.Array, start) -> jax.Array:
    """The leaf with a piece in it; as bits, since XLA's CPU widens whole bfloat16 operands."""
    if leaf.dtype.itemsize != 2:
        return jax.lax.dynamic_update_slice(leaf, piece, start)
    bits, new = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (leaf, piece))
    written = jax.lax.dynamic_update_slice(bits, new, start)
    return jax.lax.bitcast_convert_type(written, leaf.dtype)


def _start(shape: tuple[int, ...], entry: Entry, first: int) -> tuple[int, ...]:
    """Where in a leaf a piece begins that starts at row ``first`` of its tensor."""
    start = [*entry.place, *(0,) * (len(shape) - len(entry.place))]
    inner = len(shape) - len(entry.place)
    # Rows of a transposed matrix are our columns; of a stack of matrices they are matrices.
    start[-1 if entry.transposed and inner == 2 else len(entry.place)] += first
    return tuple(start)


def save(
    folder: str | Path,
    denoiser: Transformer,
    theta: Theta,
    *,
    like: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write theta as a folder that ``load`` and the published modelling code read.

    Files appear whole or not at all. The shards of a model that was there before are removed with
    their index, which would else stay in force.

    Args:
        folder: made if missing; ``config.json`` and weights in it are replaced.
        denoiser: gives the config.
        theta: base parameters, stored in their own dtype.
        like: a model folder whose further config fields are kept (``auto_map``, token ids).
        shard_bytes: largest file; more weights are cut into shards with an index.

    Raises:
        ValueError: a leaf of theta is quantised or carries an adapter.
    """
    folder = storage.path(folder)
    require_arrays(theta)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = theta["embedding"].dtype.name
    config = families.published_config(denoiser, dtype, like)
    if "dtype" in config:
        config["dtype"] = dtype
    flat = {_joined(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(theta)}
    shards = _shards(list(families.entries(denoiser)), flat, shard_bytes)
    _write(folder, shards, flat, json.dumps(config, indent=2, sort_keys=True) + "\n")


def require_arrays(theta: Theta) -> None:
    """Raise ValueError, naming it, if a leaf of theta is quantised or carries an adapter."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(theta, is_leaf=callable):
        if callable(leaf):
            raise ValueError(
                f"theta/{_joined(path)} is {type(leaf).__name__}, must be an array: merge adapters "
                "and dequantise before saving full weights"
            )


def _shards(
    entries: list[Entry], flat: Mapping[str, jax.Array], shard_bytes: int
) -> list[list[Entry]]:
    """Entries in order, cut into files of at most ``shard_bytes``."""
    shards, used = [[]], 0  # type: list[list[Entry]], int
    for entry in entries:
        leaf = flat[entry.path]
        size = int(np.prod(leaf.shape[len(entry.place) :])) * leaf.dtype.itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += size
    return shards


def _write(folder: Path, shards: list[list[Entry]], flat: Mapping, config: str) -> None:
    """Write every file under another name first, then let all take their places."""
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = [WEIGHTS] if count == 1 else names
    stale = _stale(folder) - set(names)
    with contextlib.ExitStack() as stack:
        # The last one to be entered takes its place first: a folder with a config has its weights.
        stack.enter_context(storage.replacing(folder / "config.json")).write_text(config)
        if count > 1:
            index = stack.enter_context(storage.replacing(folder / INDEX))
            index.write_text(_index(dict(zip(names, shards, strict=True)), flat))
        for name, entries in zip(names, shards, strict=True):
            tensors = {entry.name: _published(flat, entry) for entry in entries}
            file = stack.enter_context(storage.replacing(folder / name))
            save_file(tensors, file, metadata={"format": "pt"})
    if count == 1:
        (folder / INDEX).unlink(missing_ok=True)
    for name in stale:
        (folder / name).unlink(missing_ok=True)


def _published(flat: Mapping[str, jax.Array], entry: Entry) -> Any:
    """One tensor as it is published, on the host."""
    array = np.asarray(flat[entry.path][entry.place] if entry.place else flat[entry.path])
    return np.ascontiguousarray(array.T if entry.transposed else array)


def _index(shards: Mapping[str, list[Entry]], flat: Mapping[str, jax.Array]) -> str:
    total = sum(leaf.nbytes for leaf in flat.values())
    names = {entry.name: file for file, entries in shards.items() for entry in entries}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    return json.dumps(content, indent=2) + "\n"


def _stale(folder: Path) -> set[str]:
    """Weight files of the folder itself that are in force before it is written anew."""
    index = folder / INDEX
    if not index.exists():
        return {WEIGHTS}
    named = set(json.loads(index.read_text())["weight_map"].values())
    return {WEIGHTS} | {
        name for name in named if Path(name).name == name and name.endswith(".safetensors")
    }


def stored_dtype(folder: str | Path, base: str | Path | None = None) -> str:
    """The dtype of a folder's weights, of an adapter's base; the widest if there are several.

    Raises:
        FileNotFoundError, ValueError: the weights are missing or no safetensors.
    """
    found = weights.contents(weights.files(base_of(folder, base)))
    dtypes = {stored.numpy_dtype for stored in found.values() if stored.supported}
    return jnp.result_type(*dtypes or {jnp.float32}).name


def weights_digest(folder: str | Path, base: str | Path | None = None) -> str:
    """Sha256 of the files that ``load`` reads theta from, for telling starting weights apart.

    Raises:
        FileNotFoundError: one of them is missing.
    """
    digest = hashlib.sha256()
    files = weights.files(base_of(folder, base))
    if is_adapter(folder):
        files += [storage.path(folder) / name for name in (peft.CONFIG, peft.WEIGHTS)]
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()

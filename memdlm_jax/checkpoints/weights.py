"""The safetensors files of a model folder: what is in them, and their content in pieces.

Files are read with plain ``read`` calls and not mapped into memory: pages of a mapped file count as
memory of the process until the system takes them back, which would double the peak of a load.
"""

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors

from memdlm_jax import storage

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}


@dataclass(frozen=True)
class Stored:
    """One tensor on disk.

    Attributes:
        file: that holds it.
        dtype: as safetensors spells it (``BF16``).
        shape: its sizes.
        start: byte of the file at which it begins.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def supported(self) -> bool:
        """Whether its dtype is one that we read: float32, bfloat16 or float16."""
        return self.dtype in _DTYPES

    @property
    def numpy_dtype(self) -> np.dtype:
        """Its dtype; only of one that is supported."""
        return np.dtype(_DTYPES[self.dtype])

    def pieces(self, largest: int) -> Iterator[tuple[int, np.ndarray]]:
        """The content in order, cut along the first axis.

        Args:
            largest: bytes of a piece; at least one slice is read at a time.

        Yields:
            (first index, array) pairs.
        """
        dtype = self.numpy_dtype
        length, *inner = self.shape or (1,)
        row = math.prod(inner) * dtype.itemsize
        step = max(1, min(length, largest // max(row, 1)))
        with self.file.open("rb") as file:
            file.seek(self.start)
            for first in range(0, length, step):
                rows = min(step, length - first)
                content = np.empty((rows, *inner) if self.shape else (), dtype)
                # As bytes, since buffers do not know bfloat16.
                if file.readinto(content.reshape(-1).view(np.uint8).data) < content.nbytes:
                    raise ValueError(f"{self.file} ends within a tensor: it is not whole")
                yield first, content

    def read(self) -> np.ndarray:
        """The whole tensor."""
        return next(self.pieces(1 << 62))[1]


def files(folder: Path) -> list[Path]:
    """The one weights file of a folder, or its shards, by name.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: the index is malformed, or names a file outside the folder.
    """
    index = folder / INDEX
    if not index.exists():
        found = [folder / WEIGHTS]
    else:
        found = [folder / name for name in sorted(set(_weight_map(index).values()))]
    for file in found:
        if not file.exists():
            others = sorted(p.name for p in folder.glob("*.bin")) + sorted(
                p.name for p in folder.glob("*.pt*")
            )
            hint = f"; {others} are pickles, which are never read" if others else ""
            hint += f"; {INDEX} lists it: fetch it again" if index.exists() else ""
            raise FileNotFoundError(
                f"{file} is missing: a model folder holds safetensors weights{hint}"
            )
    return found


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        found = json.loads(index.read_text())["weight_map"]
        names = set(found.values())
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} has no weight_map of names to files: {error!r}") from error
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name
        if not (plain and name.endswith(".safetensors")):
            raise ValueError(
                f"{index} names {name!r}: shards must be safetensors in the folder itself"
            )
    return found


def contents(paths: Sequence[Path]) -> dict[str, Stored]:
    """Name -> tensor over all files, in the order of the files and of the bytes in them.

    Raises:
        ValueError: a file is no whole safetensors file, or two files hold a tensor of one name.
    """
    found: dict[str, Stored] = {}
    for path in paths:
        for name, tensor in _contents(path).items():
            if name in found:
                raise ValueError(f"{name} is both in {found[name].file.name} and in {path.name}")
            found[name] = tensor
    return found


@contextlib.contextmanager
def _outline(path: Path) -> Iterator[Path]:
    """The file, or for one in a bucket a file on a disk with its size and header and no more."""
    if not storage.is_remote(path):
        yield path
        return
    with path.open("rb") as file, tempfile.NamedTemporaryFile() as outline:
        start = file.read(8)
        outline.write(start + file.read(int.from_bytes(start, "little")))
        outline.truncate(max(outline.tell(), storage.size(path)))
        outline.flush()
        yield Path(outline.name)


def _contents(path: Path) -> dict[str, Stored]:
    try:
        # The library checks the header against the size of the file; offsets it keeps to itself.
        with _outline(path) as outline, safetensors.safe_open(outline, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    tensors = {
        name: Stored(
            path, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }
    return dict(sorted(tensors.items(), key=lambda pair: pair[1].start))

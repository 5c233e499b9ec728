"""Files on disks and in buckets: whatever is a path may be ``gs://BUCKET/...`` or ``s3://...``.

Paths of a disk stay ``pathlib`` paths. URLs become ``etils.epath`` paths, which have the methods
that are used here, are typed as if they were the same, and reach buckets through ``gcsfs`` and
``s3fs`` (extra ``storage``). In a bucket a file appears whole when it is closed, and nothing is
appended to it. What a library will only have on a disk is copied to a temporary folder, or written
there and then copied.
"""

import contextlib
import importlib.util
import io
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import fsspec.config
from etils import epath

_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
_kept: list[tempfile.TemporaryDirectory] = []


def path(where: str | os.PathLike[str]) -> Path:
    """A path of a disk, or one in a bucket.

    Raises:
        ValueError: the URL is of another kind than ``gs://BUCKET/...`` and ``s3://BUCKET/...``.
        ImportError: the package that reads such URLs is not installed.
    """
    text = os.fspath(where)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if scheme not in _PACKAGES or not rest.strip("/"):
        raise ValueError(
            f"{text}: must be a path of a disk, gs://BUCKET/... or s3://BUCKET/...; mount or copy "
            "what lies elsewhere"
        )
    if not _installed(_PACKAGES[scheme]):
        raise ImportError(
            f"{text} needs the package {_PACKAGES[scheme]}: pip install 'memdlm_jax[storage]'"
        )
    # Other processes write to the same folder: what it held a while ago is no answer.
    settings = fsspec.config.conf.setdefault({"gs": "gcs"}.get(scheme, scheme), {})
    settings.setdefault("use_listings_cache", False)
    found: Any = epath.Path(text)
    return found


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def is_remote(where: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL."""
    return "://" in os.fspath(where)


def absolute(where: str | os.PathLike[str]) -> Path:
    """The same place, whatever the working directory; ``epath`` would spoil a URL."""
    found = path(where)
    return found if is_remote(found) else found.absolute()


def read_text(file: Path, encoding: str = "utf-8", errors: str = "strict") -> str:
    """Content of a text file, with line ends as they are in Python; ``epath`` cannot."""
    with file.open("rb") as raw:
        return io.TextIOWrapper(io.BytesIO(raw.read()), encoding=encoding, errors=errors).read()


def size(file: Path) -> int:
    """Bytes of a file."""
    found: Any = file.stat()
    return found.length if is_remote(file) else found.st_size


def files_below(folder: Path) -> list[Path]:
    """All files of a folder and its subfolders, in order; empty if there is no such folder."""
    if not is_remote(folder):
        return sorted(found for found in folder.rglob("*") if found.is_file())
    if not folder.is_dir():
        return []
    found: list[Path] = []
    # Not ``walk``: ``epath`` gives it an argument that s3fs refuses.
    for entry in folder.iterdir():
        if entry != folder:  # A folder's own mark, as some tools leave it.
            found += files_below(entry) if entry.is_dir() else [entry]
    return sorted(found)


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a path on a disk whose file takes the place of ``file`` if all goes well.

    The file has the permissions of any new file there, also where a library that writes it gives
    it to its owner alone, as safetensors does.
    """
    if is_remote(file):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / file.name
            yield temporary
            _copy(temporary, file)
        return
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # The umask can be asked for only by changing it.
        temporary.unlink()
        yield temporary
        if temporary.stat().st_mode != mode:
            temporary.chmod(stat.S_IMODE(mode))
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def on_disk(file: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a file on a disk: itself, or a temporary copy.

    Raises:
        FileNotFoundError: it is in a bucket that does not have it.
        ValueError, ImportError: see ``path``.
    """
    found = path(file)
    if not is_remote(found):
        yield found
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / found.name
        _copy(found, local)
        yield local


def fetched(folder: Path) -> Path:
    """A folder on a disk: itself, or a copy with the same name that lasts as long as the process.

    Copies are made in ``TMPDIR``.
    """
    if not is_remote(folder):
        return folder
    _kept.append(tempfile.TemporaryDirectory())
    local = Path(_kept[-1].name) / folder.name
    copy_folder(folder, local)
    return local


def copy_folder(source: Path, target: Path, last: str = "") -> None:
    """Copy all files of a folder; the one named ``last`` after all others, as a sign of the end."""
    files = files_below(source)
    for file in sorted(files, key=lambda file: file.name == last):
        below = target / str(file)[len(str(source)) + 1 :]
        below.parent.mkdir(parents=True, exist_ok=True)
        _copy(file, below)


def move_folder(source: Path, target: Path) -> None:
    """Give a folder another name; a bucket's service copies its files, which are then deleted."""
    if not is_remote(source):
        source.rename(target)
        return
    files = _file_system(str(source).partition("://")[0])
    for file in files_below(source):
        files.cp_file(str(file), f"{target}{str(file)[len(str(source)) :]}")
    folder: Any = source
    folder.rmtree()


def _file_system(scheme: str) -> Any:
    return fsspec.filesystem(scheme)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 22)

"""One run at a time in one folder."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from memdlm_jax import processes, storage

logger = logging.getLogger(__name__)

LOCK = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)

_held = threading.local()


class FolderInUse(OSError):
    """Another run works in this folder."""


@contextlib.contextmanager
def claimed(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep every other run out of a folder; enter this before anything there is read or changed.

    Process 0 holds ``flock`` on ``folder/.lock``. The kernel drops it when the process ends, also
    by SIGKILL, so the file itself may stay. The thread that holds a folder may claim it again.
    Every process of a job has to call this.

    Two kinds of folders are not protected. In a bucket nothing can be locked, and nothing is
    done. On a file system without ``flock`` a warning says so.

    Args:
        folder: made if it is missing.

    Raises:
        FolderInUse: another process or thread holds it; in all processes of this job.
        OSError: the folder cannot be made, or its lock cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        found: OSError | None = None
        if processes.is_first() and not storage.is_remote(folder):
            try:
                stack.enter_context(_locked(Path(folder)))
            except OSError as error:
                found = error
        said = processes.gather(found and str(found))[0]
        if said:
            raise found or FolderInUse(said)
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    mine: set[Path] = _held.__dict__.setdefault("folders", set())
    folder.mkdir(parents=True, exist_ok=True)
    name = folder.resolve()
    if name in mine:
        yield
        return
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise FolderInUse(
                f"{folder} is in use by another run ({file.read().strip() or 'just started'}): "
                "wait until it ends or stop it, or choose another folder as train.output"
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            logger.warning(
                "%s cannot be locked (%s): start no second run in this folder", folder, error
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, {time.strftime('%F %T')}\n")
        file.flush()
        mine.add(name)
        try:
            yield
        finally:
            mine.remove(name)

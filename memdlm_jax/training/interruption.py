"""A run that is asked to end, as by a scheduler that wants its machines back."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from jax.experimental import multihost_utils

from memdlm_jax import processes


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Callable[[int], bool]]:
    """Yield a function that says after each step whether SIGTERM has asked to stop.

    It takes the number of steps taken, and must be asked once after every step. In one process
    SIGTERM is heard in the main thread only. Of several processes one has to get the signal: JAX,
    which listens for it in each of them, tells the others, and all hear of it after the same step.
    """
    if processes.several():
        yield multihost_utils.reached_preemption_sync_point
        return
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda _: False  # signals reach the main thread only
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield lambda _: stop.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)

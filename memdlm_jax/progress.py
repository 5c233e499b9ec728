"""Progress of long work: a bar on a terminal, elsewhere a log line at least every 30 seconds.

    with Progress("training", total=200, unit="step") as progress:
        for batch in batches:
            loss = take_step(batch)
            progress.update(loss=loss)

logs at level INFO, where standard error is not a terminal::

    training: 0/200 steps, 00:00 so far
    training: 57/200 steps, loss 4.951, 1.9 steps/s, 01:15 left
    training: 200/200 steps, loss 4.93, 1.9 steps/s, 01:47 in all

A thread writes the lines, so they come while the first step still compiles. Of several processes
only the first one speaks.
"""

import collections
import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from tqdm import tqdm

from memdlm_jax import processes

logger = logging.getLogger(__name__)

EVERY = 30.0
"""Seconds between two lines."""

_WINDOW = 10
"""Lines that the rate is measured over: a change of speed shows within five minutes."""


class Progress(contextlib.AbstractContextManager):
    """How far one piece of work is; to be used in a ``with`` statement.

    Attributes:
        done: units of work that are finished.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "step",
        done: int = 0,
        *,
        brief: bool = False,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Describe the work; nothing is shown yet.

        Args:
            what: its name.
            total: units of work in all; ``None`` if that is not known.
            unit: singular name of a unit. An empty one is for work that cannot be counted: it is
                ``brief``, and has no bar.
            done: units that were finished before.
            brief: for what takes seconds as a rule: no first and last line, and the bar goes away.
            quiet: show nothing.
            clock: seconds; tests replace it.
        """
        self._what, self._total, self._unit, self.done = what, total, unit, done
        self._clock, self._start = clock, clock()
        self._brief, self._speaks = brief or not unit, not quiet and _is_first()
        self._now, self._numbers = "", dict[str, float]()
        # The rate does not count the time before the first update, which compiles.
        self._marks = collections.deque[tuple[float, int]](maxlen=_WINDOW)
        self._bar: tqdm | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def __enter__(self) -> "Progress":
        """Show the bar, or log the first line."""
        self._start = self._clock()
        if self._speaks and self._unit and sys.stderr.isatty():
            self._bar = tqdm(
                desc=self._what, total=self._total, initial=self.done, unit=f" {self._unit}s",
                dynamic_ncols=True, leave=not self._brief,
            )  # fmt: skip
        elif self._speaks and logger.isEnabledFor(logging.INFO):
            if not self._brief:
                logger.info("%s", self.line())
            self._thread = threading.Thread(target=self.speak, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        """Close the bar, or log the last line."""
        self._ended.set()
        if self._bar is not None:
            self._bar.close()
        if self._thread is not None:
            self._thread.join()
            if not self._brief:
                logger.info("%s", self.line(ended=True))

    def update(self, count: int = 1, **numbers: float) -> None:
        """Count finished units.

        Args:
            count: of them, 0 or more.
            **numbers: to show from now on, such as ``loss``.
        """
        self.done += count
        self._numbers |= numbers
        if count and not self._marks:
            self._marks.append((self._clock(), self.done))
        if self._bar is not None:
            if numbers:
                self._show_beside_bar()
            self._bar.update(count)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show what happens at the moment, such as ``compiling``; an empty text changes nothing."""
        if not what:
            yield
            return
        before, self._now = self._now, what
        self._show_beside_bar()
        try:
            yield
        finally:
            self._now = before
            self._show_beside_bar()

    def _show_beside_bar(self) -> None:
        if self._bar is not None:
            shown = [*self._described(), *([self._now] if self._now else [])]
            self._bar.set_postfix_str(", ".join(shown))

    def speak(self, wait: Callable[[float], bool] | None = None) -> None:
        """Log a line every ``EVERY`` seconds until the work has ended.

        Args:
            wait: sleeps for so many seconds and returns whether the work has ended; tests replace
                it.
        """
        wait = wait or self._ended.wait
        while not wait(EVERY):
            logger.info("%s", self.line())
            if self._marks:
                self._marks.append((self._clock(), self.done))

    def line(self, ended: bool = False) -> str:
        """How far the work is at this moment, in one line."""
        now, done = self._clock(), self.done
        parts = []
        if self._unit:
            of = "" if self._total is None else f"/{self._total:,}"
            parts.append(f"{done:,}{of} {self._unit}s")
        parts += self._described()
        if self._now and not ended:
            parts.append(self._now)
        rate = self._rate(now, done)
        if rate:
            parts.append(f"{_short(rate)} {self._unit}s/s")
        if ended:
            parts.append(f"{tqdm.format_interval(now - self._start)} in all")
        elif rate and self._total is not None:
            parts.append(f"{tqdm.format_interval(max(self._total - done, 0) / rate)} left")
        else:
            parts.append(f"{tqdm.format_interval(now - self._start)} so far")
        return f"{self._what}: {', '.join(parts)}"

    def _described(self) -> list[str]:
        return [f"{name} {value:.4g}" for name, value in self._numbers.items()]

    def _rate(self, now: float, done: int) -> float:
        """Units a second since the oldest mark; 0 if not known yet."""
        if not self._marks:
            return 0.0
        then, before = self._marks[0]
        return (done - before) / (now - then) if now > then else 0.0


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _is_first() -> bool:
    """As ``processes.is_first``, but a process that is alone looks for no device."""
    return not jax.distributed.is_initialized() or processes.is_first()

"""Long work says how far it is: on a terminal by a bar, elsewhere line by line."""

import logging
import sys
import time

import pytest

from memdlm_jax import processes, progress
from memdlm_jax.progress import EVERY, Progress


class Clock:
    """Seconds that pass only when somebody waits."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


def lines(caplog):
    return [record.getMessage() for record in caplog.records]


@pytest.fixture(autouse=True)
def heard(caplog):
    caplog.set_level(logging.INFO, "memdlm_jax.progress")


def test_a_line_every_thirty_seconds_also_while_the_first_step_compiles(caplog):
    """What the thread does, with a clock of the test's."""
    clock = Clock()
    bar = Progress("training", 200, "step", clock=clock)

    def compiling(seconds):
        assert seconds == EVERY == 30
        clock.wait(seconds)
        return clock.now > 60

    def running(seconds):
        for _ in range(seconds):
            clock.wait(1)
            bar.update(loss=4.9876)
        return bar.done > 60

    with bar.doing("compiling"):
        bar.speak(compiling)
    bar.speak(lambda seconds: running(int(seconds)))
    assert lines(caplog) == [
        "training: 0/200 steps, compiling, 00:30 so far",
        "training: 0/200 steps, compiling, 01:00 so far",
        "training: 30/200 steps, loss 4.988, 1 steps/s, 02:50 left",
        "training: 60/200 steps, loss 4.988, 1 steps/s, 02:20 left",
    ]


def test_the_rate_is_that_of_the_last_minutes_without_compiling():
    clock = Clock()
    bar = Progress("training", 10_000, "step", done=100, clock=clock)
    clock.wait(600)  # compiles
    bar.update()
    assert "so far" in bar.line() and "steps/s" not in bar.line()
    pace = iter([(3, 30)] * 40 + [(30, 30)] * 12)

    def wait(seconds):
        count, passed = next(pace, (None, 0))
        if count is None:
            return True
        bar.update(count)
        clock.wait(passed)
        return False

    bar.speak(wait)
    assert ", 1 steps/s, " in bar.line()
    left = 10_000 - 101 - 3 * 40 - 30 * 12
    assert bar.line().startswith(f"training: {10_000 - left:,}/10,000 steps")
    assert bar.line().endswith(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")


def test_work_of_unknown_size_and_work_that_cannot_be_counted():
    clock = Clock()
    rows, loading = (Progress("x", unit=unit, clock=clock) for unit in ("row", ""))
    rows.update(1000)
    clock.wait(10)
    rows.update(2000)
    assert rows.line() == "x: 3,000 rows, 200 rows/s, 00:10 so far"
    assert rows.line(ended=True) == "x: 3,000 rows, 200 rows/s, 00:10 in all"
    assert loading.line() == "x: 00:10 so far"


def test_the_first_and_the_last_line_and_what_is_done_now(caplog):
    with Progress("asking", 4, "question") as bar:
        with bar.doing("validating"), bar.doing(""):
            assert "validating" in bar.line()
        bar.update(4, score=0.5)
    said = lines(caplog)
    assert said[0] == "asking: 0/4 questions, 00:00 so far"
    assert said[-1].startswith("asking: 4/4 questions, score 0.5") and "in all" in said[-1]


def test_brief_and_quiet_work_says_nothing_at_first(caplog):
    for settings in ({"brief": True}, {"unit": ""}, {"quiet": True}):
        with Progress("x", **settings) as bar:
            bar.update()
    assert not lines(caplog)


def test_the_lines_come_from_a_thread(caplog, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.02)
    with Progress("x", brief=True):
        deadline = time.monotonic() + 30
        while len(lines(caplog)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)  # As long as a compiler takes.
    assert len(lines(caplog)) >= 3


def test_only_the_first_process_speaks(caplog, monkeypatch):
    monkeypatch.setattr(progress.jax.distributed, "is_initialized", lambda: True)
    for first in (False, True):
        monkeypatch.setattr(processes, "is_first", lambda first=first: first)
        with Progress(f"x {first}", 1):
            pass
    assert [line.split(":")[0] for line in lines(caplog)] == ["x True"] * 2


def test_a_terminal_gets_a_bar_and_no_lines(caplog, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("training", 3, "step", done=1) as bar:
        with bar.doing("compiling"):
            pass
        bar.update(2, loss=4.5)
    shown = capsys.readouterr().err
    assert "training:" in shown and "1/3" in shown and "3/3" in shown
    assert "compiling" in shown and "loss 4.5" in shown and not lines(caplog)

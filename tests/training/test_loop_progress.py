"""A training run whose output is no terminal says how far it is."""

import os
import re
import subprocess
import sys


def test_training_into_a_pipe_shows_step_loss_rate_and_time_left(tmp_path, environment):
    # A line every 50 ms, as the run is short.
    script = (
        "import logging, sys, pathlib\n"
        "from memdlm_jax import progress\n"
        "from tests.training import tiny\n"
        "logging.basicConfig(level=logging.INFO, format='%(message)s', force=True)\n"
        "progress.EVERY = 0.05\n"
        "tiny.run(pathlib.Path(sys.argv[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=os.environ | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("training: ")]
    assert said[0] == "training: 0/12 steps, 00:00 so far"
    compiling = r"training: 0/12 steps, compiling for rows of \d+ tokens, [\d:]+ so far"
    assert any(re.fullmatch(compiling, line) for line in said)
    running = r"training: \d+/12 steps, loss [\d.]+, ([a-z 0-9]+, )?[\d.e-]+ steps/s, [\d:]+ left"
    assert any(re.fullmatch(running, line) for line in said)
    assert re.match(r"training: 12/12 steps, loss [\d.]+, .* in all", said[-1])
    assert "\r" not in done.stderr

"""One step function for one device and for several."""

import os
import subprocess
import sys


def test_two_devices_take_the_same_step_as_one(environment):
    """In one process, which says last what it is at."""
    two = "--xla_force_host_platform_device_count=2"
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {two}"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.two_devices", "example", "global", "frozen"],
        env=os.environ | environment | flags, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()

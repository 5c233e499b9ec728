"""Several real processes that run one module, as on so many hosts."""

import os
import socket
import subprocess
import sys


def launch(module, job, folder, count, environment):
    """Run ``python -m MODULE JOB FOLDER PORT COUNT NUMBER`` for each number.

    Returns:
        Exit codes, and what each process said; that stands in FOLDER/JOB-NUMBER.txt too.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | environment | {"JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
    base = [sys.executable, "-m", module, job, str(folder), port, str(count)]
    started = []
    try:
        for number in range(count):
            with (folder / f"{job}-{number}.txt").open("w") as said:
                command = [*base, str(number)]
                started.append(subprocess.Popen(command, env=env, stdout=said, stderr=said))
        for process in started:
            process.wait(timeout=300)
    finally:
        for process in started:
            process.kill()
            process.wait()
    texts = [(folder / f"{job}-{number}.txt").read_text() for number in range(count)]
    return [process.returncode for process in started], texts

"""One run at a time in one folder: who is kept out, and who is not."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest

from memdlm_jax.training.run_folder import LOCK, FolderInUse, claimed

HOLDER = """
import sys
from memdlm_jax.training.run_folder import claimed
with claimed(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder ``run`` of a test."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def refusal(folder):
    with pytest.raises(FolderInUse) as error, claimed(folder):
        pass
    return str(error.value)


def test_another_process_is_refused_in_one_line_that_says_what_to_do(tmp_path, holder):
    said = refusal(tmp_path / "run")
    assert f"{tmp_path}/run is in use by another run (process {holder.pid} on " in said
    assert "wait until it ends or stop it" in said and "train.output" in said and "\n" not in said
    assert [file.name for file in (tmp_path / "run").iterdir()] == [LOCK]


def test_a_killed_process_leaves_the_folder_free(tmp_path, holder):
    refusal(tmp_path / "run")
    holder.send_signal(signal.SIGKILL)
    assert holder.wait(timeout=60) == -signal.SIGKILL
    with claimed(tmp_path / "run"):
        assert f"process {os.getpid()} " in (tmp_path / "run" / LOCK).read_text()


def test_the_thread_that_holds_a_folder_may_claim_it_again_and_others_may_not(tmp_path):
    said = []
    other = threading.Thread(target=lambda: said.append(refusal(tmp_path)))
    with claimed(tmp_path):
        with claimed(tmp_path / "."):
            pass
        other.start()
        other.join()
    assert f"process {os.getpid()} on" in said[0]
    with claimed(tmp_path):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claimed(tmp_path):
        pass
    assert f"{tmp_path} cannot be locked" in caplog.text


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file/run"), claimed(tmp_path / "file" / "run"):
        pass

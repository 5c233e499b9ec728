"""The training state on disk: what comes back is what was written, or an error says why not."""

import hashlib
import json
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax import storage
from memdlm_jax.checkpoints import training_state
from memdlm_jax.checkpoints.training_state import (
    ConfigMismatch,
    CorruptCheckpoint,
    NoUsableCheckpoint,
    TrainingCheckpoints,
)

CONFIG = {"model.width": 8, "data.buckets": (4, 8), "memory": None}


def state(step):
    rng = np.random.default_rng(step)
    return {
        "step": jnp.int32(step),
        "wide": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32),
        "narrow": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
    }


@pytest.fixture
def opened(tmp_path):
    """Open the folder of a test, as often as asked, and close all in the end."""
    managers = []

    def open_folder(config=CONFIG, keep_last=2):
        managers.append(TrainingCheckpoints(tmp_path / "run", config, keep_last))
        return managers[-1]

    yield open_folder
    for manager in managers:
        manager.close()


def saved(opened, *steps, losses=None):
    checkpoints = opened()
    for step in steps:
        loss = (losses or {}).get(step)
        checkpoints.save(step, state(step), 10 * step, loss=loss, extra={"note": step})
    checkpoints.wait()
    return checkpoints


def files_of(checkpoints, step):
    files = [f for f in (checkpoints.folder / str(step)).rglob("*") if f.is_file()]
    return sorted(files, key=lambda file: file.stat().st_size)


def flip(file, place=0.5):
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 1
    file.write_bytes(bytes(content))


def test_what_comes_back_is_what_was_saved(opened):
    saved(opened, 1, 2)
    restored = opened().restore_latest(state(0))
    assert (restored.step, restored.position, restored.extra) == (2, 20, {"note": 2})
    jax.tree.map(np.testing.assert_array_equal, restored.state, state(2))
    assert restored.state["narrow"].dtype == jnp.bfloat16


def test_older_checkpoints_are_read_and_verified(opened, monkeypatch):
    """They have a sha256 of each array's bytes in the place of the digest."""
    monkeypatch.setattr(training_state._describe, "__defaults__", ("sha256",))
    checkpoints = saved(opened, 1, 2)
    monkeypatch.undo()
    known = hashlib.sha256(np.asarray(state(2)["wide"]).tobytes()).hexdigest()
    notes = json.loads(next((checkpoints.folder / "2" / "notes").iterdir()).read_text())
    assert notes["notes"]["arrays"]["wide"]["sha256"] == known
    assert "digest" not in notes["notes"]["arrays"]["wide"]
    jax.tree.map(np.testing.assert_array_equal, opened().restore(2, state(0)).state, state(2))
    flip(files_of(checkpoints, 2)[-1])
    with pytest.raises(CorruptCheckpoint, match="digest of array"):
        opened().restore(2, state(0))


def test_an_empty_folder_restores_nothing(opened):
    assert opened().restore_latest(state(0)) is None
    assert opened().best().step is None


def test_a_state_may_be_donated_while_it_is_written(opened):
    checkpoints, now = opened(), state(1)
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    checkpoints.save(1, now, 10)
    for _ in range(5):
        now = double(now)
    checkpoints.wait()
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(1, state(0)).state, state(1))


def test_keeps_the_newest_and_the_best(opened):
    checkpoints = saved(opened, *range(1, 7), losses={1: 3.0, 2: 1.0, 4: 2.0})
    assert checkpoints.steps() == [2, 5, 6] and checkpoints.best().step == 2
    again = opened()
    again.save(7, state(7), 70)
    again.wait()
    assert again.steps() == [2, 6, 7] and again.best().step == 2


def test_the_first_of_equal_losses_is_the_best(opened):
    checkpoints = saved(opened, *range(1, 7), losses={1: 3.0, 2: 1.0, 3: 1.0, 4: 1.0})
    assert checkpoints.steps() == [2, 5, 6] and checkpoints.best().step == 2


@pytest.mark.parametrize(
    "content",
    ["", '{"loss": 1', '{"loss": "x"}', '{"loss": NaN}', "[1.0]", "\udcff", None],
    ids=repr,
)
@pytest.mark.parametrize("step", [2, 5])
def test_a_damaged_loss_is_named_and_mended(opened, caplog, content, step):
    checkpoints = saved(opened, *range(1, 7), losses={1: 3.0, 2: 1.0, 4: 2.0})
    checkpoints.close()
    file = checkpoints.folder / str(step) / "metrics" / "metrics"
    file.unlink()
    if content is not None:
        file.write_text(content, errors="surrogateescape")
    again = opened()
    assert (f"{file} is " in caplog.text) == (content is not None or step == 2)
    assert again.restore_latest(state(0)).step == 6 and again.best() == (2, 1.0)
    again.save(7, state(7), 70, loss=1.5)
    again.wait()
    assert again.steps() == [2, 6, 7] and again.best() == (2, 1.0)
    caplog.clear()
    again.close()
    assert opened().best() == (2, 1.0) and not caplog.text


def test_a_damaged_loss_that_the_notes_do_not_have_is_none(opened, caplog):
    """As in checkpoints of earlier versions; or the notes are damaged too."""
    checkpoints = saved(opened, *range(1, 5), losses={1: 1.0, 3: 2.0})
    checkpoints.close()
    (checkpoints.folder / "1" / "metrics" / "metrics").write_text("")
    (checkpoints.folder / "1" / "notes" / "metadata").write_text("{}")
    again = opened()
    assert "1/metrics/metrics is damaged" in caplog.text
    assert "its loss is not known" in caplog.text
    assert again.restore_latest(state(0)).step == 4 and again.best() == (3, 2.0)
    again.save(5, state(5), 50)
    again.wait()
    assert again.steps() == [3, 4, 5]


def test_what_a_checkpoint_replaces_is_freed_before_its_arrays_are_restored(opened, monkeypatch):
    saved(opened, 1)
    checkpoints, first = opened(), state(0)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), first
    )
    assert not any(leaf.is_deleted() for leaf in first.values())
    with pytest.raises(ConfigMismatch):
        opened(CONFIG | {"new": 1}).restore_latest(placed, frees=first)
    assert not any(leaf.is_deleted() for leaf in first.values())
    restored = checkpoints.restore_latest(placed, frees=first)
    assert all(leaf.is_deleted() for leaf in first.values())
    jax.tree.map(np.testing.assert_array_equal, restored.state, state(1))


def test_a_step_that_is_not_there_is_named(opened):
    saved(opened, 1, 2)
    with pytest.raises(NoUsableCheckpoint, match=r"step 7 is not in .*run, only \[1, 2\] are"):
        opened().restore(7, state(0))


def test_a_flipped_byte_in_the_arrays_is_found_and_the_step_before_is_used(opened, caplog):
    checkpoints = saved(opened, 1, 2)
    flip(files_of(checkpoints, 2)[-1])
    with pytest.raises(CorruptCheckpoint, match="digest of array"):
        opened().restore(2, state(0))
    again = opened()
    restored = again.restore_latest(state(0))
    assert restored.step == 1 and "falling back to the one before" in caplog.text
    again.save(2, state(2), 20)
    again.wait()
    assert again.steps() == [1, 2] and (again.folder / "2.corrupt").is_dir()


def test_a_corrupt_step_that_cannot_be_renamed_is_named(opened, monkeypatch):
    flip(files_of(saved(opened, 1, 2), 2)[-1])

    def refuse(source, target):
        raise PermissionError("read only")

    monkeypatch.setattr(storage, "move_folder", refuse)
    with pytest.raises(OSError, match=r"/2 cannot be renamed: PermissionError: read only"):
        opened().restore_latest(state(0))


@pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
def test_a_flipped_byte_in_the_notes_is_found(opened, place):
    checkpoints = saved(opened, 1, 2)
    flip(checkpoints.folder / "2" / "notes" / "metadata", place)
    assert opened().restore_latest(state(0)).step == 1


def test_a_truncated_file_is_found(opened):
    checkpoints = saved(opened, 1, 2)
    largest = files_of(checkpoints, 2)[-1]
    largest.write_bytes(largest.read_bytes()[:100])
    assert opened().restore_latest(state(0)).step == 1


def test_an_error_if_nothing_is_left(opened):
    checkpoints = saved(opened, 1, 2)
    for step in (1, 2):
        flip(files_of(checkpoints, step)[-1])
    with pytest.raises(NoUsableCheckpoint, match=r"steps \[2, 1\]"):
        opened().restore_latest(state(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.width": 16}, "has model.width=8, this run has model.width=16"),
        ({"data.buckets": (4,)}, r"has data.buckets=\[4, 8\], this run has data.buckets=\[4\]"),
        ({"memory": {"steps": 2}}, "has memory=None, this run has memory={'steps': 2}"),
        ({"new": 1}, r"has new='\(absent\)', this run has new=1"),
    ],
)
def test_another_configuration_is_refused_by_field(opened, change, message):
    saved(opened, 1)
    with pytest.raises(ConfigMismatch, match=message):
        opened(CONFIG | change).restore_latest(state(0))
    assert opened().steps() == [1]


def test_another_dtype_is_refused_where_orbax_would_cast(opened):
    saved(opened, 1)
    template = state(0) | {"narrow": jnp.zeros(5, jnp.float32)}
    with pytest.raises(ConfigMismatch, match=r"array narrow of checkpoint 1 .*bfloat16.*float32"):
        opened().restore_latest(template)


def test_another_shape_and_missing_arrays_are_refused(opened):
    saved(opened, 1)
    with pytest.raises(ConfigMismatch, match=r"array wide .*\[64, 32\].*\[2, 2\]"):
        opened().restore_latest(state(0) | {"wide": jnp.zeros((2, 2))})
    with pytest.raises(ConfigMismatch, match="array more of checkpoint 1 is absent"):
        opened().restore_latest(state(0) | {"more": jnp.zeros(1)})


def test_no_checkpoint_at_all_cannot_be_asked_for(tmp_path):
    with pytest.raises(ValueError, match="keep_last=0 must be at least 1"):
        TrainingCheckpoints(tmp_path, CONFIG, keep_last=0)


KILLED = """
import os, signal, sys, time
import jax.numpy as jnp
import numpy as np
from tests.checkpoints.test_training_state import CONFIG, state
from memdlm_jax.checkpoints.training_state import TrainingCheckpoints
checkpoints = TrainingCheckpoints(sys.argv[1], CONFIG)
checkpoints.save(1, state(1), 10)
checkpoints.wait()
large = jnp.asarray(np.random.default_rng(0).normal(size=(16, 1 << 20)))
checkpoints.save(2, state(2) | {"large": large}, 20)
while not any(name.startswith("2") for name in os.listdir(sys.argv[1])):
    time.sleep(0.001)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_while_saving_leaves_the_step_before(tmp_path, opened):
    folder = str(tmp_path / "run")
    dead = subprocess.run([sys.executable, "-c", KILLED, folder], capture_output=True, timeout=300)
    assert dead.returncode == -signal.SIGKILL, dead.stderr.decode()
    checkpoints = opened()
    assert checkpoints.steps() == [1]
    jax.tree.map(
        np.testing.assert_array_equal, checkpoints.restore_latest(state(0)).state, state(1)
    )
    checkpoints.save(2, state(2), 20)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]

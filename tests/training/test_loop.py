"""The loop: resuming to the bit, stopping, validation, and what it writes."""

import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from memdlm_jax.checkpoints.training_state import ConfigMismatch, NoUsableCheckpoint
from memdlm_jax.training import feed, loop
from memdlm_jax.training.metrics import MetricsWriter
from memdlm_jax.training.parallel import CompiledSteps
from memdlm_jax.training.run_folder import FolderInUse, claimed
from tests.training import tiny


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, tiny.run(folder)


class Interrupting(tiny.Data):
    """Sends a signal to this process when a step's batch is asked for."""

    def __init__(self, step):
        self.step = step

    def batch_at(self, step):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch_at(step)


def lines_of(folder, timed=False):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in one.items() if timed or "speed/" not in k} for one in lines]


def assert_same_run(folder, result, undisturbed):
    other_folder, other = undisturbed
    jax.tree.map(np.testing.assert_array_equal, result.state, other.state)
    assert (result.best_step, result.best_loss) == (other.best_step, other.best_loss)
    assert lines_of(folder) == lines_of(other_folder)


def largest_file(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def test_reports_and_validates_at_its_periods(undisturbed):
    folder, result = undisturbed
    lines = lines_of(folder, timed=True)
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 8, 9, 10, 12]
    validated = {line["step"]: line.get("validation/loss/memory_off") for line in lines}
    scores = {step: score for step, score in validated.items() if score is not None}
    assert list(scores) == [4, 8, 12]
    assert result.finished and result.best_loss == min(scores.values())
    assert scores[result.best_step] == result.best_loss
    assert all(line["speed/tokens_per_second"] > 0 for line in lines)
    assert list((folder / "tensorboard").glob("events.*"))


def test_loss_falls(undisturbed):
    lines = lines_of(undisturbed[0])
    assert lines[-1]["validation/loss/memory_off"] < lines[2]["validation/loss/memory_off"]


def test_a_killed_run_resumes_to_the_bit(tmp_path, undisturbed, environment):
    command = [sys.executable, "-m", "tests.training.tiny", str(tmp_path), "8"]
    dead = subprocess.run(command, env=os.environ | environment, capture_output=True, timeout=300)
    assert dead.returncode == -signal.SIGKILL, dead.stderr.decode()
    last = lines_of(tmp_path)[-1]["step"]
    assert 4 <= last < 12
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss/mem')  # cut off in the middle of a line
    assert_same_run(tmp_path, tiny.run(tmp_path), undisturbed)


class Twice(tiny.Data):
    """Starts a second run in the same folder in the middle of the first."""

    def __init__(self, folder, changes):
        self.folder, self.changes, self.refusals = folder, changes, []

    def batch_at(self, step):
        if step == 6:
            (self.folder / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()
            before = (self.folder / "metrics.jsonl").stat()
            with pytest.raises(FolderInUse, match=f"{self.folder} is in use by another run"):
                tiny.run(self.folder, **self.changes)
            assert (self.folder / "checkpoints" / "7.orbax-checkpoint-tmp").is_dir()
            assert (self.folder / "metrics.jsonl").stat().st_ino == before.st_ino
            self.refusals.append(step)
        return super().batch_at(step)


@pytest.mark.parametrize("changes", [{}, {"validation_seed": 9}], ids=["same", "other"])
def test_a_second_start_in_the_folder_leaves_the_run_as_it_is(tmp_path, undisturbed, changes):
    data = Twice(tmp_path, changes)
    assert_same_run(tmp_path, tiny.run(tmp_path, data=data), undisturbed)
    assert data.refusals == [6]


def test_the_best_of_a_running_run_is_not_loaded(tmp_path, undisturbed):
    other = dataclasses.replace(undisturbed[1], best_step=9)
    thread_failed = []

    def load():
        try:
            loop.load_best(
                tiny.train_config(tmp_path),
                tiny.setup(),
                other,
                loop.RunData(None, tiny.validation()),
            )
        except FolderInUse as error:
            thread_failed.append(error)

    with claimed(tmp_path):
        thread = threading.Thread(target=load)
        thread.start()
        thread.join()
    assert thread_failed and not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("step", ["4", "8"])
def test_a_run_whose_step_has_a_damaged_loss_resumes_to_the_bit(
    tmp_path, undisturbed, caplog, step
):
    tiny.run(tmp_path, steps=8, keep_last=9)
    file = tmp_path / "checkpoints" / step / "metrics" / "metrics"
    file.write_text("")
    assert_same_run(tmp_path, tiny.run(tmp_path), undisturbed)
    assert f"{file} is damaged" in caplog.text


def live_bytes():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_nothing_of_the_first_state_is_alive_when_a_checkpoint_is_restored(
    tmp_path, undisturbed, monkeypatch
):
    tiny.run(tmp_path, steps=3, validate_every=0)
    before, found = live_bytes(), []
    state = tiny.fresh_state()
    size = live_bytes() - before
    restore = ocp.CheckpointManager.restore

    def measured(manager, step, *, args):
        if "state" in args.keys():  # noqa: SIM118
            found.append(live_bytes() - before)
        return restore(manager, step, args=args)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", measured)
    config = tiny.train_config(tmp_path, steps=6, validate_every=0)
    loop.run(config, tiny.setup(), state, loop.RunData(tiny.Data(), tiny.validation()))
    assert size > 3 * 4 * 2000 and len(found) == 1
    assert found[0] < size / 20, (found, size)


def test_flops_may_be_left_uncounted(tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(CompiledSteps, "inner_loop_share", None)
    assert_same_run(tmp_path, tiny.run(tmp_path, count_flops=False), undisturbed)
    for line in lines_of(tmp_path, timed=True):
        assert [name for name in line if "speed/" in name] == ["speed/tokens_per_second"]


def test_sigterm_saves_and_stops_and_the_run_goes_on(tmp_path, undisturbed):
    stopped = tiny.run(tmp_path, data=Interrupting(7))
    assert not stopped.finished and 4 <= int(stopped.state.step) < 12
    assert_same_run(tmp_path, tiny.run(tmp_path), undisturbed)


def test_a_corrupt_checkpoint_is_detected_and_the_one_before_used(tmp_path, undisturbed, caplog):
    tiny.run(tmp_path, data=Interrupting(9))
    saved = sorted(int(f.name) for f in (tmp_path / "checkpoints").iterdir() if f.name.isdigit())
    flip_a_byte(largest_file(tmp_path / "checkpoints" / str(saved[-1])))
    resumed = tiny.run(tmp_path)
    assert f"checkpoint {saved[-1]} " in caplog.text and "falling back" in caplog.text
    assert_same_run(tmp_path, resumed, undisturbed)


def test_a_finished_run_stays_as_it_is(undisturbed):
    folder, result = undisturbed
    assert_same_run(folder, tiny.run(folder), (folder, result))


def test_other_settings_do_not_resume_and_are_named(undisturbed):
    folder, _ = undisturbed
    setup = tiny.setup()
    other = dataclasses.replace(setup.optimizer, learning_rate=1e-5)
    changed = dataclasses.replace(setup, optimizer=other)
    with pytest.raises(ConfigMismatch, match=r"optimizer\.learning_rate=0\.003.*1e-05"):
        loop.run(
            tiny.train_config(folder),
            changed,
            tiny.fresh_state(),
            loop.RunData(tiny.Data(), tiny.validation()),
        )


def test_the_best_is_never_compared_across_validation_sets(undisturbed):
    folder, _ = undisturbed
    with pytest.raises(ConfigMismatch, match=r"has train\.validation_seed=1, this run has .*=9"):
        tiny.run(folder, validation_seed=9)
    config, state = tiny.train_config(folder), tiny.fresh_state()
    for other in (tiny.validation()[:1], tiny.validation()[::-1]):
        with pytest.raises(ConfigMismatch, match=r"has validation\.batches="):
            loop.run(config, tiny.setup(), state, loop.RunData(tiny.Data(), other))


def test_validation_rows_with_more_targets_than_training_lose_none(tmp_path):
    class Short(tiny.Data):
        """No training row has more than two targets."""

        def batch_at(self, step):
            batch = super().batch_at(step)
            return batch.replace(maskable=batch.maskable & (np.cumsum(batch.maskable, 1) <= 2))

        def target_capacity(self, length):
            return 2

    def corrupt(key, batch):
        """All of a row, so that all of it must be counted."""
        return batch.maskable, jax.numpy.ones(batch.tokens.shape[0])

    validation, setup = [tiny.batch(1)], tiny.setup(corruption=corrupt)
    config = tiny.train_config(tmp_path, steps=1, validate_every=1)
    result = loop.run(config, setup, tiny.fresh_state(), loop.RunData(Short(), validation))
    steps = CompiledSteps(setup, lambda length: length)
    whole = loop.validate(steps, result.state.theta, validation, config.validation_seed)
    assert result.best_loss == pytest.approx(whole["loss/memory_off"], rel=1e-5)


def test_a_row_with_more_targets_than_slots_is_refused():
    steps = CompiledSteps(tiny.setup(), lambda length: 4)
    with pytest.raises(ValueError, match=r"has 9 maskable tokens, more than its 4 target slots"):
        steps.train(tiny.fresh_state(), tiny.batch(), jax.random.key(0), True)


def test_batches_are_put_on_the_device_ahead_by_another_thread(tmp_path, monkeypatch):
    put, made, taken = CompiledSteps.put, [], []

    def recording(steps, batch):
        placed = put(steps, batch)
        made.append((threading.current_thread(), placed))
        return placed

    def take(steps, state, batch, key, report):
        taken.append((batch, len(made)))
        return run(steps, state, batch, key, report)

    run = CompiledSteps.train
    monkeypatch.setattr(CompiledSteps, "put", recording)
    monkeypatch.setattr(CompiledSteps, "train", take)
    tiny.run(tmp_path, steps=4, validate_every=0)
    assert all(thread is not threading.main_thread() for thread, _ in made)
    assert [batch for batch, _ in taken] == [placed for _, placed in made]
    for step, (batch, _) in enumerate(taken):
        wanted = tiny.Data().batch_at(step)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch.device))
        for given in (batch.host, batch.device):
            jax.tree.map(np.testing.assert_array_equal, given, wanted)


def test_a_bad_row_stops_the_run_at_its_step(tmp_path):
    class Long(tiny.Data):
        """From the fourth step on, rows have more targets than was promised."""

        def target_capacity(self, length):
            return length - 3 if length == 8 else 99

        def batch_at(self, step):
            batch = super().batch_at(step)
            return batch if step != 6 else batch.replace(maskable=batch.valid)

    with pytest.raises(ValueError, match=r"length 8 has 8 maskable tokens, more than its 5 target"):
        tiny.run(tmp_path, data=Long(), validate_every=0)
    assert lines_of(tmp_path)[-1]["step"] == 6


def test_the_best_step_is_loaded(tmp_path, undisturbed):
    folder, result = undisturbed
    copied = jax.tree.map(jax.numpy.copy, result.state)  # Its optimiser state is freed.
    earlier = dataclasses.replace(result, best_step=9, state=copied)
    validation = tiny.validation()
    theta = loop.load_best(
        tiny.train_config(folder), tiny.setup(), earlier, loop.RunData(None, validation)
    )
    different = jax.tree.map(lambda a, b: bool((a != b).any()), theta, result.state.theta)
    assert any(jax.tree.leaves(different))


def test_the_first_of_equally_good_steps_is_the_best(tmp_path):
    frozen = dataclasses.replace(tiny.OPTIMIZER, learning_rate=1e-30)
    setup = dataclasses.replace(tiny.setup(), optimizer=frozen)
    config = tiny.train_config(tmp_path, steps=8, validate_every=1, save_every=20, keep_last=1)
    result = loop.run(
        config, setup, tiny.fresh_state(frozen), loop.RunData(tiny.Data(), [tiny.batch(1)])
    )
    losses = {line["validation/loss/memory_off"] for line in lines_of(tmp_path)}
    assert len(losses) == 1 and result.best_step == 1
    theta = loop.load_best(config, setup, result, loop.RunData(None, [tiny.batch(1)]))
    jax.tree.map(np.testing.assert_array_equal, theta, result.state.theta)


def test_a_best_step_that_is_gone_is_no_longer_the_best(tmp_path, caplog):
    frozen = dataclasses.replace(tiny.OPTIMIZER, learning_rate=1e-30)
    setup = dataclasses.replace(tiny.setup(), optimizer=frozen)
    for steps in (3, 4):
        config = tiny.train_config(tmp_path, steps=steps, validate_every=1, save_every=1)
        result = loop.run(
            config, setup, tiny.fresh_state(frozen), loop.RunData(tiny.Data(), [tiny.batch(1)])
        )
        assert result.best_step == steps - 2
        shutil.rmtree(tmp_path / "checkpoints" / "1", ignore_errors=True)
    assert "step 1 was the best, but it is gone" in caplog.text
    loop.load_best(config, setup, result, loop.RunData(None, [tiny.batch(1)]))


def test_all_corrupt_is_an_error(tmp_path, undisturbed):
    tiny.run(tmp_path, steps=1)
    flip_a_byte(largest_file(tmp_path / "checkpoints" / "1"))
    with pytest.raises(NoUsableCheckpoint, match=r"all checkpoints .* are corrupt"):
        tiny.run(tmp_path, steps=1)


def test_a_step_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path):
    def corrupt(key, batch):
        mask, weight = tiny.corrupt(key, batch)
        return mask, jax.numpy.where(batch.tokens.sum() == poison, jax.numpy.inf, weight)

    poison = int(tiny.Data().batch_at(4).tokens.sum())
    setup, config = tiny.setup(corruption=corrupt), tiny.train_config(tmp_path, validate_every=0)
    with pytest.raises(loop.NotFinite, match="step 5: "):
        loop.run(config, setup, tiny.fresh_state(), loop.RunData(tiny.Data()))
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["3"]


def test_a_validation_loss_that_is_not_finite_stops_the_run(tmp_path):
    def corrupt(key, batch):
        mask, weight = tiny.corrupt(key, batch)
        return mask, jax.numpy.where(batch.tokens.sum() == poison, jax.numpy.inf, weight)

    poison = int(tiny.batch(1).tokens.sum())
    setup, config = tiny.setup(corruption=corrupt), tiny.train_config(tmp_path, steps=1)
    with pytest.raises(loop.NotFinite, match=r"step 1: validation loss is .*memory_off.* inf"):
        loop.run(config, setup, tiny.fresh_state(), loop.RunData(tiny.Data(), [tiny.batch(1)]))


def test_profiles_the_steps_asked_for(tmp_path):
    tiny.run(tmp_path, steps=4, validate_every=0, profile_steps=1)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_batches_are_made_in_order_and_closing_early_stops_the_thread():
    batches = feed.ahead(lambda step: step, 3, 9)
    assert [next(batches) for _ in range(3)] == [3, 4, 5]
    batches.close()
    assert list(feed.ahead(lambda step: step, 3, 5, depth=4)) == [3, 4]


def test_lines_of_later_steps_are_cut(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1.0}\n{"step": 5}\n{"st')
    writer = MetricsWriter(tmp_path, 2)
    writer.write(3, {"a": float("nan")})
    writer.close()
    assert lines_of(tmp_path) == [{"step": 1, "a": 1.0}, {"step": 3, "a": None}]


@pytest.mark.parametrize(
    "change",
    [
        {"output": ""}, {"steps": 0}, {"log_every": 0}, {"save_every": 0}, {"keep_last": 0},
        {"validate_every": -1}, {"seed": -1}, {"validation_seed": -1}, {"profile_steps": -1},
    ],
    ids=str,
)  # fmt: skip
def test_bad_loop_settings_are_named_with_their_value(change):
    (name, value), = change.items()  # fmt: skip
    with pytest.raises(ValueError, match=rf"train\.{name}={value!r} must"):
        loop.TrainConfig(**({"output": "x", "steps": 1} | change))

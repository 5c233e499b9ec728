"""One job in several real processes: a run that two begin, four go on with and one ends."""

import json
import os
import signal
import time

import jax
import numpy as np
import pytest

from memdlm_jax.processes import DistributedConfig, start
from tests.launch import launch
from tests.training import on_processes
from tests.training.test_loop import flip_a_byte, largest_file

PROMPTS = "".join(f"who {'really ' * (i % 3)}asks {i}?\n" for i in range(7))
KILLED = -signal.SIGKILL


def together(job, folder, count, environment):
    """Run a job of ``on_processes``, compiled as fast as can be."""
    cheap = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {cheap}"}
    return launch("tests.training.on_processes", job, folder, count, environment | flags)


def lines_of(folder):
    text = (folder / "run" / "metrics.jsonl").read_text()
    return {line["step"]: line for line in map(json.loads, text.splitlines())}


@pytest.fixture(scope="module")
def chain(tmp_path_factory, environment):
    """The jobs, one after the other, in one folder."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "prompts.txt").write_text(PROMPTS)
    codes, said = together("first", folder, 2, environment)
    assert codes == [0, 0], "\n".join(text[-3000:] for text in said)
    found = {
        "first": [json.loads((folder / f"first-{n}.json").read_text()) for n in range(2)],
        "stopped": max(lines_of(folder)),
    }
    flip_a_byte(largest_file(folder / "run" / "checkpoints" / str(found["stopped"])))
    found["codes"], found["said"] = together("second", folder, 4, environment)
    found["seconds"] = time.time() - (folder / "killed").stat().st_mtime
    found["killed"] = max(lines_of(folder))
    found["saved"] = max(
        int(f.name) for f in (folder / "run" / "checkpoints").iterdir() if f.name.isdigit()
    )
    found["end"] = on_processes.train(folder, on_processes.Data())
    return found | {"folder": folder}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, environment):
    """The same run, undisturbed, in this process."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, on_processes.train(folder, on_processes.Data())


def same_metrics(found, expected):
    for name in expected.keys() - {n for n in expected if n.startswith("speed/")}:
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


@pytest.mark.distributed
def test_all_stop_after_the_same_step_when_one_gets_sigterm(chain):
    one, two = chain["first"]
    assert one["step"] == two["step"] == chain["stopped"]
    # Batches are asked for two steps ahead.
    assert on_processes.SIGTERM_AT - 2 <= one["step"] < on_processes.STEPS - 6
    assert not one["finished"] and not two["finished"]


@pytest.mark.distributed
def test_two_and_four_processes_take_the_steps_of_one(chain, alone):
    expected, found = lines_of(alone[0]), lines_of(chain["folder"])
    assert sorted(found) == sorted(expected) == list(range(1, on_processes.STEPS + 1))
    assert 2 < chain["stopped"] < chain["killed"] - 1
    for step, line in expected.items():
        same_metrics(found[step], line)
        assert found[step]["speed/tokens_per_second"] > 0


@pytest.mark.distributed
def test_rows_on_two_processes_have_the_memories_that_they_have_on_one(chain):
    expected = on_processes.step_with_memory()
    assert "inner/phi_norm" in expected
    for found in chain["first"]:
        same_metrics(found["with_memory"], expected)


@pytest.mark.distributed
def test_a_job_whose_process_was_killed_ends_soon_and_goes_on_with_one(chain, alone):
    assert chain["codes"][3] == KILLED, chain["said"][3][-3000:]
    assert all(code not in (0, None) for code in chain["codes"][:3])
    assert chain["seconds"] < 9 * on_processes.HEARTBEAT
    assert chain["stopped"] < chain["saved"] <= chain["killed"] < on_processes.STEPS
    end, (_, expected) = chain["end"], alone
    assert end.finished and (end.best_step, int(end.state.step)) == (
        expected.best_step, on_processes.STEPS
    )  # fmt: skip
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        end.state.theta, expected.state.theta,
    )  # fmt: skip


@pytest.mark.distributed
def test_a_corrupt_checkpoint_is_set_aside_by_all(chain):
    folder, step = chain["folder"] / "run" / "checkpoints", chain["stopped"]
    assert (folder / f"{step}.corrupt").is_dir()
    assert all(f"checkpoint {step} in " in said for said in chain["said"])


@pytest.mark.distributed
def test_an_earlier_step_is_loaded_by_all(chain, alone):
    expected = lines_of(alone[0])[2]["parameter_norm"]
    for found in chain["first"]:
        assert found["norm_after_2"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.distributed
def test_each_process_reads_its_own_rows(chain):
    one, two = (found["taken"] for found in chain["first"])
    assert not set(one) & set(two)
    steps, rows = chain["stopped"], on_processes.ROWS
    plan = on_processes.Data().plan
    for step in range(steps):
        planned, half = plan.at(step).rows.tolist(), rows // 2
        assert one[step * half : (step + 1) * half] == planned[:half]
        assert two[step * half : (step + 1) * half] == planned[half:]


@pytest.mark.distributed
def test_a_row_may_lie_on_several_processes(chain):
    for found in chain["first"]:
        assert found["placed"] == {"rows": [0, 1, 2, 3], "shapes": [[4, 4]], "equal": True}


@pytest.mark.distributed
def test_a_digest_is_that_of_one_process_and_a_gathered_array_whole(chain):
    for found in chain["first"]:
        assert found["divided"]["equal"] and found["divided"]["digest"] == found["divided"]["one"]


@pytest.mark.distributed
def test_a_folder_in_use_is_refused_by_all(chain):
    for found in chain["first"]:
        assert f"{chain['folder']}/held is in use by another run" in found["refused"]


@pytest.mark.distributed
def test_what_processes_tell_each_other(chain):
    for found in chain["first"]:
        assert [one["number"] for one in found["gathered"]] == [0, 1]
    assert [found["alone"] for found in chain["first"]] == [False, True]


@pytest.mark.distributed
def test_questions_and_rows_are_shared_out(chain, tmp_path):
    expected = on_processes.questions(tmp_path)
    folder = chain["folder"]
    for found in chain["first"]:
        assert found["questions"] == expected
        assert found["measured"] == on_processes.measured()
    files = sorted(folder.glob("answers*.jsonl"))
    numbers = [[json.loads(x)["index"] for x in f.read_text().splitlines()] for f in files]
    assert [f.name for f in files] == ["answers-1.jsonl", "answers.jsonl"]
    assert numbers == [[1, 3], [0, 2, 4]]
    # One process takes up what two have left, and asks only what is missing.
    told = []
    assert on_processes.questions(folder, told.append) == expected and told == [5]
    files[0].unlink()
    told = []
    assert on_processes.questions(folder, told.append) == expected and told == [3, 2]


@pytest.mark.distributed
def test_prompts_are_shared_out_and_the_first_process_writes(chain, tmp_path):
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    on_processes.generated(tmp_path)
    expected = (tmp_path / "generated.jsonl").read_text()
    assert [json.loads(x)["prompt"] for x in expected.splitlines()] == PROMPTS.splitlines()
    assert len({json.loads(x)["reply"] for x in expected.splitlines()}) > 2
    assert (chain["folder"] / "generated.jsonl").read_text() == expected


@pytest.mark.distributed
def test_the_harness_is_told_the_same_by_all(chain):
    expected = on_processes.harness_answers()
    assert len(set(expected["generate"])) > 1
    for found in chain["first"]:
        assert found["harness"]["generate"] == expected["generate"]
        scores = [[score, greedy] for score, greedy in found["harness"]["score"]]
        np.testing.assert_allclose(scores, expected["score"], rtol=1e-5)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"process_id": 0}, r"distributed\.process_id=0 needs distributed\.coordinator and dis"),
        ({"coordinator": "h:1", "num_processes": 2}, r"needs distributed\.process_id too"),
        ({"coordinator": "h", "num_processes": 1, "process_id": 0}, "'h' must be HOST:PORT"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, r"process_id=2 must lie in"),
        ({"coordinator": "h:1", "num_processes": 0, "process_id": 0}, "num_processes=0 must be"),
        ({"auto": True, "num_processes": 2}, r"num_processes=2 must be empty with .*auto=True"),
        ({"heartbeat_seconds": 0}, "heartbeat_seconds=0 must be at least 1"),
    ],
)
def test_contradictions_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        DistributedConfig(**given)


def test_alone_nothing_is_started():
    start(DistributedConfig())
    assert not jax.distributed.is_initialized()

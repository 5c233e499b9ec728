"""Configs: every mistake is named by its dotted path."""

import dataclasses
import subprocess
import sys
from typing import Any, Literal

import pytest
from absl import flags
from ml_collections import config_dict, config_flags

from experiments import _cli, finetune
from experiments.configs import finetune_jsonl, finetune_needles
from memdlm_jax.checkpoints.training_state import ConfigMismatch, CorruptCheckpoint
from memdlm_jax.diffusion.schedule import CosineSchedule, LinearSchedule, Schedule
from memdlm_jax.registry import SCHEDULES
from memdlm_jax.training.loop import NotFinite
from memdlm_jax.training.sharding import MeshConfig
from tests.memory import own_parts


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float
    kind: Literal["a", "b"] = "a"
    bound: float | None = 1.0

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError(f"rate={self.rate} must be positive")


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[str, float] = ("x", 1.0)
    many: tuple[Inner, ...] = ()
    flag: bool = False
    note: Any = None


def settings(**changes):
    return config_dict.ConfigDict({"name": "n", "inner": {"rate": 0.5}} | changes)


def test_nested_settings_become_nested_dataclasses():
    built = _cli.build(
        Outer,
        settings(sizes=[3, 4], many=({"rate": 1}, {"rate": 2.0, "bound": None}), note={"a": 1}),
    )
    assert built.inner == Inner(0.5) and built.sizes == (3, 4)
    assert built.many == (Inner(1.0), Inner(2.0, bound=None))
    assert type(built.many[0].rate) is float


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"nam": "x"}, KeyError, r"config\.nam is no field of Outer; did you mean 'name'\?"),
        ({"zzz": "x"}, KeyError, r"config\.zzz is no field of Outer; known are \['flag'"),
        ({"inner": {}}, KeyError, r"config\.inner\.rate is missing; Inner needs it"),
        ({"inner": {"rate": "1"}}, TypeError, r"config\.inner\.rate='1' is str, must be float"),
        ({"inner": {"rate": True}}, TypeError, r"config\.inner\.rate=True is bool, must be float"),
        ({"inner": {"rate": 1.0, "kind": "c"}}, ValueError, r"inner\.kind='c' must be one of 'a'"),
        ({"inner": {"rate": -1.0}}, ValueError, r"config\.inner: rate=-1\.0 must be positive"),
        ({"inner": {"rate": 1.0, "bound": "x"}}, TypeError, r"config\.inner\.bound='x' is str"),
        ({"inner": 3}, TypeError, r"config\.inner=3 is int, must be Inner"),
        ({"name": 3}, TypeError, r"config\.name=3 is int, must be str"),
        ({"flag": 1}, TypeError, r"config\.flag=1 is int, must be bool"),
        ({"sizes": (1, 2.5)}, TypeError, r"config\.sizes\[1\]=2\.5 is float, must be int"),
        ({"sizes": 3}, TypeError, r"config\.sizes=3 is int, must be a tuple"),
        ({"pair": ("x",)}, TypeError, r"config\.pair=.* has 1 values, must have 2"),
        ({"many": ({"rat": 1.0},)}, KeyError, r"config\.many\[0\]\.rat is no field"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_mistakes_are_named_by_dotted_path(change, error, message):
    with pytest.raises(error, match=message):
        _cli.build(Outer, settings(**change))


def test_a_missing_field_at_the_top_is_named():
    with pytest.raises(KeyError, match=r"config\.name is missing; Outer needs it"):
        _cli.build(Outer, {"inner": {"rate": 1.0}})


def needles(**overrides):
    config = finetune_needles.get_config()
    config.update_from_flattened_dict({"init": "model", "train.output": "out"} | overrides)
    return config


def test_the_shipped_config_builds_with_and_without_memory():
    config = finetune.from_config_dict(needles())
    assert config.memory is not None and config.optimizer.total_steps == config.train.steps
    plain = finetune.from_config_dict(needles(**{"memory.enabled": False}))
    assert dataclasses.replace(plain, memory=config.memory) == config


def test_a_mesh_must_be_asked_for_and_is_checked_all_the_same():
    assert finetune.from_config_dict(needles()).mesh is None
    meshed = finetune.from_config_dict(needles(**{"mesh.enabled": True, "mesh.fsdp": 2}))
    assert meshed.mesh == MeshConfig(fsdp=2)
    with pytest.raises(ValueError, match=r"config\.mesh: mesh\.fsdp=0 must be at least 1"):
        finetune.from_config_dict(needles(**{"mesh.fsdp": 0}))


def test_the_config_for_own_examples_builds():
    config = finetune_jsonl.get_config("own.jsonl")
    config.update_from_flattened_dict({"init": "model", "train.output": "out"})
    built = finetune.from_config_dict(config)
    assert built.data.sources[0].path == "own.jsonl" and built.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"init": ""}, "init='' must name a model folder"),
        ({"train.output": ""}, r"train\.output='' must name a folder"),
        ({"memory.rank": 0}, r"memory\.rank=0 must be at least 1"),
        ({"memory.enabled": False, "memory.adapter": "lor"}, r"memory\.adapter='lor' must be"),
        ({"optimizer.accumulation": 0}, r"optimizer\.accumulation=0 must be at least 1"),
        ({"schedule.minimum_time": 2.0}, r"minimum_time=2\.0 must lie in"),
        ({"pipeline.buckets": (256, 128)}, r"buckets=\(256, 128\) must be ascending"),
        ({"validation_batches": -1}, "validation_batches=-1 must be at least 0"),
    ],
    ids=str,
)
def test_mistakes_in_a_fine_tuning_config_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        finetune.from_config_dict(needles(**overrides))


class Ended(Exception):
    """Stands for what a wrong program raises."""


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ValueError("x=1 must be 2"), "error: x=1 must be 2"),
        (FileNotFoundError(2, "No such file", "a"), "error: [Errno 2] No such file: 'a'"),
        (ConfigMismatch("differs"), "error: differs"),
        (CorruptCheckpoint("flipped"), "error: flipped"),
        (NotFinite("step 3"), "error: step 3"),
        (ImportError("pip install x"), "error: pip install x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_mend_is_said_in_one_line(raised, said):
    with pytest.raises(SystemExit) as ended, _cli._one_line():
        raise raised
    assert ended.value.code == said
    with pytest.raises(Ended), _cli._one_line():
        raise Ended


def test_what_a_config_file_refuses_is_said_in_one_line(monkeypatch):
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    argv = ["generate", "--config=experiments/configs/generate.py:nope"]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    with pytest.raises(SystemExit) as ended:
        _cli._parse_flags(argv)
    assert ended.value.code.startswith("error: sampler 'nope' must be one of 'llada'")


def test_steps_given_on_the_command_line_reach_the_schedule():
    config = needles()
    config.train.steps = 7
    assert finetune.from_config_dict(config).optimizer.total_steps == 7


def test_several_processes_are_refused_before_they_wait_for_each_other():
    command = [sys.executable, "-m", "experiments.chat", "--config.distributed.auto=True"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.endswith(
        "error: config.distributed must be as it is by default: a conversation is held in one "
        "process; experiments.generate answers prompts in several\n"
    )


class TestSchedules:
    """A config names its masking schedule."""

    @dataclasses.dataclass(frozen=True)
    class Settings:
        schedule: Schedule

    def built(self, **settings):
        return _cli.build(self.Settings, {"schedule": settings}).schedule

    def test_by_name_linear_where_none_is_given(self):
        assert self.built() == LinearSchedule()
        assert self.built(name="cosine", minimum_time=0.2) == CosineSchedule(0.2)

    def test_ones_own_is_imported_or_registered(self):
        own = self.built(name="tests.memory.own_parts:SquareSchedule", sampling="low_discrepancy")
        assert own == own_parts.SquareSchedule(sampling="low_discrepancy")
        SCHEDULES.register("square_of_this_test")(own_parts.SquareSchedule)
        assert type(self.built(name="square_of_this_test")) is own_parts.SquareSchedule

    def test_bad_ones_are_refused_by_field(self):
        with pytest.raises(ValueError, match=r"config\.schedule\.name='quartic' must be one of"):
            self.built(name="quartic")
        with pytest.raises(ValueError, match=r"schedule\.name='math:pi' must name a subclass"):
            self.built(name="math:pi")
        with pytest.raises(KeyError, match=r"config\.schedule\.minimum_tim is no field of Linear"):
            self.built(minimum_tim=0.1)

"""Compiling for devices that are not here: names, arithmetic, and a program of each kind."""

import dataclasses
import importlib.util
import math
import time

import jax
import pytest

from experiments import _decode, compile_for_tpu
from experiments.configs.compile_for_tpu import get_config
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.models.published import PUBLISHED
from memdlm_jax.training import ahead_of_time, optimizer, state, topology
from memdlm_jax.training.hlo import Collective, Costs
from memdlm_jax.training.sharding import Layout, MeshConfig
from memdlm_jax.training.step import StepSetup
from memdlm_jax.training.topology import Chip, Topology

MODEL = "tests/golden/backbones/llada_dense"


def settings(**changes):
    config = get_config(MODEL)
    config.topology, config.length, config.vocab_chunk = "cpu:1", 16, 0
    config.mesh.fsdp = 1
    config.memory.update(rank=2, alpha=4.0, layer_fraction=0.5)
    config.decode = _decode.settings(length=4, block_length=2, cache="dual")
    config.update(changes)
    return compile_for_tpu.from_config_dict(config)


@pytest.mark.parametrize(
    ("name", "size"), [("v5e:16x16", 256), ("v5p:4x4x8", 128), ("h100:32", 32), ("cpu:3", 3)]
)
def test_a_topology_knows_its_size(name, size):
    assert Topology(name).size == size


@pytest.mark.parametrize(
    "name", ["v4-8", "v5e", "v5e:16", "v5e:4x4x4", "v5p:4x4", "h100:12", "h100:0", "v6e:8x8 "]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=r"topology='.*' must"):
        Topology(name)


def test_a_missing_compiler_and_too_few_devices_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    for name, package in (("v5e:2x2", "libtpu"), ("h100:8", "jax_cuda12_plugin")):
        with pytest.raises(ImportError, match=f"{package}.*make pods"):
            Topology(name).devices()
    with pytest.raises(ValueError, match="xla_force_host_platform_device_count=4096"):
        Topology("cpu:4096").devices()


def test_every_kind_of_chip_has_its_facts():
    assert set(topology.CHIPS) == {"v5e", "v5p", "v6e", "h100"}
    assert topology.CHIPS["v5e"].peak_flops == 197e12 and Topology("cpu:1").chip is None


def test_the_roofline_is_the_slowest_of_three():
    chip = Chip(peak_flops=100, memory=1, memory_bandwidth=10, link_bandwidth=5, host_bandwidth=2)
    near, far = Collective("all-gather", 4, 4, 1, 30.0), Collective("all-gather", 8, 2, 1, 8.0)
    found = ahead_of_time.roofline(chip, Costs(500, 80, (near, far)), model_flops=300)
    # Of two rings over four hosts, each takes a half, and leaves each host by one device.
    assert (found.compute, found.memory, found.links) == (5, 8, max((30 + 8 / 2) / 5, 8 / 2 / 2))
    assert (found.seconds, found.bound, found.utilisation) == (8, "memory", 300 / 100 / 8)
    farther = Collective("all-gather", 4, 1, 1, 40.0)
    found = ahead_of_time.roofline(chip, Costs(500, 80, (near, farther)), model_flops=300)
    assert (found.seconds, found.bound) == (40 / 2, "links")
    # Without a network of its own between hosts all are neighbours.
    alone = dataclasses.replace(chip, host_bandwidth=None)
    assert ahead_of_time.roofline(alone, Costs(500, 80, (near, far)), 300).links == 38 / 5


def test_bytes_between_hosts_are_those_of_rings_walked_by_hand():
    """Four devices on each of three hosts: every ring is walked hop by hop."""
    devices, on_host, result = 12, 4, 120.0
    far, sent = [0.0] * devices, [0.0] * devices
    for ring in range(on_host):
        # Through a host from device ``ring + 1`` round to ``ring``, which hands on to the next.
        order = [h * on_host + (ring + 1 + i) % on_host for h in range(3) for i in range(on_host)]
        for here, there in zip(order, order[1:] + order[:1], strict=True):
            piece = result / on_host * (devices - 1) / devices
            sent[here] += piece
            far[here] += piece * (here // on_host != there // on_host)
    found = Collective("all-gather", devices, on_host, 1, sent[0])
    assert sent == pytest.approx([result * 11 / 12] * devices)
    assert far == pytest.approx([found.between_hosts] * devices)
    # Everybody to everybody: 8 of 11 others are far.
    assert Collective("all-to-all", 12, 4, 1, 11.0).between_hosts == 8
    assert Collective("collective-permute", 2, 1, 1, 3.0).between_hosts == 3
    assert Collective("all-gather", 4, 4, 1, 3.0).between_hosts == 0


def test_the_largest_states_need_no_memory():
    for lora in (False, True):
        config = compile_for_tpu.from_config_dict(get_config("llada2_1_mini"))
        if lora:
            config = dataclasses.replace(config, lora=compile_for_tpu.LoraConfig())
        trained, frozen = compile_for_tpu.trainable(PUBLISHED["llada2_1_mini"], config)
        leaves = jax.tree.leaves((trained, frozen))
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
        assert sum(math.prod(leaf.shape) for leaf in leaves) >= 16_255_643_392
        assert {leaf.dtype.name for leaf in jax.tree.leaves(trained)} == {"float32"}


def test_a_training_step_is_compiled_and_counted():
    config = settings(remat="none")
    report = compile_for_tpu.compile_step(config)
    # Nothing is computed twice: what is compiled is what the mathematics says. Products with a
    # single row or column may be compiled to sums, which do not count.
    assert report.costs.flops == pytest.approx(report.model_flops, rel=0.03)
    assert report.costs.collectives == () and report.roofline is None
    assert report.memory.peak >= report.memory.arguments > 0
    assert "cpu:1: 1 devices (no axis)" in ahead_of_time.shown(report)


def test_a_step_of_decoding_reads_a_block_or_all(tmp_path):
    reports = {}
    for program in ("decode", "decode_first"):
        config = settings(program=program, json=str(tmp_path / "found.json"))
        reports[program] = compile_for_tpu.compile_step(config)
    # A block of 2 beside the cache, against a canvas of 16.
    least, most = (reports[name].costs.flops for name in ("decode", "decode_first"))
    assert 4 * least < most
    assert '"model_flops"' in (tmp_path / "found.json").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 10_000}, "beyond the model's max_length"),
        ({"program": "decode", "length": 4}, "more than decode.length=4"),
        ({"base": "int8"}, "needs lora"),
        ({"rows": -1}, "rows=-1 must be at least 0"),
        ({"mesh": {"fsdp": 3}}, "do not multiply to the 1 devices"),
        ({"topology": "v5e-256"}, "topology='v5e-256' must be"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_compiled(changes, message):
    with pytest.raises(ValueError, match=message):
        compile_for_tpu.compile_step(settings(**changes))


def test_a_large_parameter_must_be_divided():
    """On a mesh that divides rows alone every device would hold all of it."""
    mesh = jax.sharding.AbstractMesh(
        (8, 1, 1, 1, 1), ("data", "fsdp", "expert", "sequence", "tensor")
    )
    shapes = jax.eval_shape(PUBLISHED["llada_8b"].init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"MB would lie whole on each of the 8 devices"):
        ahead_of_time._check_replicated(Layout(mesh), shapes)


class Refused:
    """What is lowered, and the compiler then refuses."""

    def __init__(self, message):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_what_does_not_fit_ends_with_the_message_of_the_compiler(monkeypatch):
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 134.19G of 15.75G hbm."
    work = ahead_of_time.Work(Refused(said), 0, {}, 0.0)
    monkeypatch.setattr(compile_for_tpu, "work_of", lambda config, layout: work)
    with pytest.raises(ValueError, match=f"{MODEL} does not fit cpu:1: {said}"):
        compile_for_tpu.main(settings())
    work.lowered.message = "INTERNAL: the compiler failed"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compile_for_tpu.main(settings())


@pytest.fixture
def hasty_compiler():
    """Programs that take longer to run, in half the time."""
    before = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    yield
    jax.config.update("jax_exec_time_optimization_effort", before)


@pytest.mark.pods
def test_a_small_step_compiles_for_four_tpu_chips(hasty_compiler):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the compiler for TPUs, is not installed: make pods")
    place = Topology("v5e:2x2")
    denoiser = LLaDA(
        LLaDAConfig(
            4096, 256, 2, 4, 4, 1024, mask_token_id=4095, max_length=128, dtype="bfloat16",
            tied=True,
        )
    )  # fmt: skip
    settings = optimizer.OptimizerConfig(total_steps=10)
    shapes = jax.eval_shape(
        lambda key: state.create(denoiser.init(key), settings), jax.random.key(0)
    )
    layout = Layout(MeshConfig(data=1, fsdp=2, tensor=2).build(place.devices()))
    inner_loop = InnerLoop(denoiser, MemoryConfig(rank=4, layer_fraction=0.5))
    setup = StepSetup(denoiser, settings, inner_loop, capacity=128)
    start = time.process_time()
    work = ahead_of_time.train_step(layout, setup, shapes, None, rows=8, length=128)
    report, _ = ahead_of_time.compile_for(place, layout, work)
    print(f"{time.process_time() - start:.0f} s of CPU time")
    assert report.costs.flops == pytest.approx(report.model_flops / 4, rel=0.03)
    assert report.costs.unknown_loops == 0
    kinds = {c.kind for c in report.costs.collectives}
    assert {"all-gather", "all-reduce"} <= kinds
    assert 0 < report.roofline.utilisation < 1
    # Parameters and moments, divided by four but for the norms.
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.theta))
    assert report.memory.arguments == pytest.approx(3 * 4 * count / 4, rel=0.1)
    assert report.memory.peak < place.chip.memory

"""Compile the real step of a published model for a pod that is not here, and say what it takes.

    make pods                                # once: the compilers, in .venv-pods
    .venv-pods/bin/python -m experiments.compile_for_tpu --topology=v5e:16x16 \
        --config=experiments/configs/compile_for_tpu.py:llada_moe_7b_a1b --config.mesh.tensor=4

Prints memory, FLOPs and collectives of one device, the roofline time of a step and the model FLOP
utilisation that it allows. What does not fit ends the script with status 1 and the compiler's
message. See docs/pods.md.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from typing import Any, Literal

import jax
from absl import flags
from ml_collections import config_dict

from experiments import _cli, _model
from memdlm_jax import storage
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.inference.generation import Generator
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import inner_loop_for
from memdlm_jax.models import lora
from memdlm_jax.models.config import Remat
from memdlm_jax.models.lora import LoraConfig
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.parameters import Partitioned
from memdlm_jax.partitioning import row_shards
from memdlm_jax.progress import Progress
from memdlm_jax.training import ahead_of_time
from memdlm_jax.training import state as states
from memdlm_jax.training.ahead_of_time import Report, Work
from memdlm_jax.training.optimizer import OptimizerConfig
from memdlm_jax.training.sharding import Layout, MeshConfig
from memdlm_jax.training.step import StepSetup
from memdlm_jax.training.topology import Topology
from memdlm_jax.typing import Theta

logger = logging.getLogger(__name__)

Program = Literal["train", "decode", "decode_first"]


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """What is compiled, and for what.

    Attributes:
        model: name of a published model, or a model folder, of which no weights are read.
        topology: see ``training.topology.Topology``.
        program: ``train``, a training step; ``decode``, a denoising step, which with
            ``decode.cache`` reads the block alone; ``decode_first``, a block's first step, which
            reads the whole canvas.
        mesh: how devices are divided.
        optimizer: of the training step.
        memory: of training and decoding; ``None`` for none.
        decode: the sampler.
        rows: of the whole batch; 0 is one row for each part of ``mesh.data * mesh.fsdp`` and
            micro-batch.
        length: tokens of a row; in decoding, of a prompt and its window together.
        capacity: target slots of a row; 0 is all.
        lora: outer adapters, which alone are trained; ``None`` trains everything.
        base: how parameters that are not trained are held. What is trained is float32, and
            activations are as the model was published.
        remat: what the backward pass recomputes, see ``TransformerConfig``.
        vocab_chunk: tokens of the vocabulary that the loss takes at a time; 0 takes all.
        effort: of the compiler, from -1 to 1; -1 compiles in half the time, to a slower program.
        json: file for the report.
        hlo: file for the compiled program's text.
    """

    model: str
    topology: Topology
    program: Program
    mesh: MeshConfig
    optimizer: OptimizerConfig
    memory: MemoryConfig | None
    decode: DecodeConfig
    rows: int = 0
    length: int = 4096
    capacity: int = 0
    lora: LoraConfig | None = None
    base: _model.Base = "bfloat16"
    remat: Remat = "full"
    vocab_chunk: int = 0
    effort: float = 0.0
    json: str = ""
    hlo: str = ""

    def __post_init__(self):
        for name in ("rows", "capacity", "vocab_chunk"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if not -1 <= self.effort <= 1:
            raise ValueError(f"effort={self.effort} must be in [-1, 1]")
        if self.length < 1 or (self.program != "train" and self.length <= self.decode.length):
            raise ValueError(
                f"length={self.length} must be at least 1, and in decoding more than "
                f"decode.length={self.decode.length}"
            )
        if self.lora is None and self.program == "train" and self.base in ("int8", "nf4"):
            raise ValueError(f"base={self.base!r} needs lora: codes cannot be trained")


def from_config_dict(config: config_dict.ConfigDict) -> CompileConfig:
    """Build the settings; ``enabled = False`` drops the rest of ``memory`` or ``lora``.

    Raises:
        KeyError, TypeError, ValueError: naming the field, see ``_cli.build``.
    """
    settings = config.to_dict()
    for name, kind in (("memory", MemoryConfig), ("lora", LoraConfig)):
        _cli.drop_disabled(settings, name, kind)
    settings["topology"] = Topology(settings["topology"])
    return _cli.build(CompileConfig, settings)


def work_of(config: CompileConfig, layout: Layout) -> Work:
    """The program, traced for the mesh.

    Raises:
        FileNotFoundError, ValueError: there is no such model; or see ``ahead_of_time.train_step``.
    """
    denoiser = _model.described(config.model)
    if config.length > denoiser.config.max_length:
        raise ValueError(
            f"length={config.length} is beyond the model's max_length={denoiser.config.max_length}"
        )
    rows = config.rows or row_shards(layout.mesh) * config.optimizer.accumulation
    if config.program == "train":
        return _train(config, layout, denoiser, rows)
    theta = _model.shapes(denoiser, config.base, None)
    first, prompt = config.program == "decode_first", config.length - config.decode.length
    generator = Generator(denoiser, inner_loop_for(denoiser, config.memory), config.decode)
    return ahead_of_time.decode_step(layout, generator, theta, rows, prompt, first)


def _train(config: CompileConfig, layout: Layout, denoiser: Transformer, rows: int) -> Work:
    trained, frozen = trainable(denoiser, config)
    state = jax.eval_shape(lambda theta: states.create(theta, config.optimizer), trained)
    denoiser = denoiser.with_config(
        remat=config.remat, vocab_chunk=config.vocab_chunk,
        param_dtype="float32" if frozen is None else denoiser.config.param_dtype,
    )  # fmt: skip
    dropout = config.lora is not None and config.lora.dropout > 0
    setup = StepSetup(
        denoiser, config.optimizer, inner_loop_for(denoiser, config.memory),
        capacity=config.capacity or None,
        dropout=lora.with_dropout if dropout else None,
    )  # fmt: skip
    return ahead_of_time.train_step(layout, setup, state, frozen, rows, config.length)


def trainable(denoiser: Transformer, config: CompileConfig) -> tuple[Any, Theta]:
    """Shapes of what is trained, in float32, and of what is not, or ``None``."""
    if config.lora is None:
        return _model.shapes(denoiser, "float32", None), None
    theta = _model.shapes(denoiser, config.base, config.lora)
    assert isinstance(theta, Partitioned)
    return theta.trainable, theta.frozen


def compile_step(config: CompileConfig) -> Report:
    """Trace, compile, count, and write the files asked for.

    Raises:
        DoesNotFit: with the compiler's message.
        ImportError, FileNotFoundError, ValueError: naming the field.
    """
    layout = Layout(config.mesh.build(config.topology.devices()))
    for file in filter(None, (config.hlo, config.json)):
        storage.path(file).parent.mkdir(parents=True, exist_ok=True)
    with Progress("tracing", unit=""):
        work = work_of(config, layout)
    logger.info("traced in %.0f s, compiling for %s", work.seconds, config.topology.name)
    with _effort(config.effort), Progress("compiling", unit=""):
        report, text = ahead_of_time.compile_for(config.topology, layout, work)
    if config.hlo:
        storage.path(config.hlo).write_text(text)
    if config.json:
        found = {"config": dataclasses.asdict(config)} | report.as_dict()
        storage.path(config.json).write_text(json.dumps(found, indent=1) + "\n")
    return report


@contextlib.contextmanager
def _effort(effort: float) -> Iterator[None]:
    name = "jax_exec_time_optimization_effort"
    before = getattr(jax.config, name)
    jax.config.update(name, effort)
    try:
        yield
    finally:
        jax.config.update(name, before)


def main(config: CompileConfig) -> None:
    """Run from the command line."""
    try:
        print(ahead_of_time.shown(compile_step(config)))
    except ahead_of_time.DoesNotFit as error:
        raise ValueError(f"{config.model} does not fit {config.topology.name}: {error}") from error


def run() -> None:
    """``main`` with the flags of the command line."""
    # Nothing runs: a device that happens to be there is left alone.
    jax.config.update("jax_platforms", "cpu")
    topology = flags.DEFINE_string("topology", None, "Short for --config.topology=NAME.")

    def parse(config: config_dict.ConfigDict) -> CompileConfig:
        if topology.value is not None:
            config.topology = topology.value
        return from_config_dict(config)

    _cli.run(parse, main, "experiments/configs/compile_for_tpu.py")


if __name__ == "__main__":
    run()

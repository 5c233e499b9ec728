"""Fine-tune a model folder with or without the Parametric Memory, and export the best weights.

    python -m experiments.finetune --config=experiments/configs/finetune_needles.py \
        --config.init=MODEL --config.train.output=OUTPUT

``--config.memory.enabled=False`` is the plain MDLM on the same batches with the same masks.
Running the same command again resumes. ``OUTPUT/best`` holds the weights of the step with the
lowest memory-off validation loss, in the format that every other script loads, and the settings
of the memory that they were trained with. With ``--config.lora.enabled=True`` only adapters are
trained, over a base that is frozen and may be narrow (``--config.base=nf4``), and ``best`` holds
them as PEFT does.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import config_dict

from experiments import _cli, _memory, _model
from memdlm_jax import partitioning, processes, storage
from memdlm_jax.checkpoints import hugging_face, peft
from memdlm_jax.data.pipeline import PipelineConfig, make_pipeline, resolved
from memdlm_jax.data.prepare import DataConfig, PreparedData, prepare
from memdlm_jax.diffusion.objective import PAPER_LOSS, LossConfig
from memdlm_jax.diffusion.schedule import Schedule
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop, inner_loop_for
from memdlm_jax.models import lora
from memdlm_jax.models.config import Remat
from memdlm_jax.models.lora import LoraConfig
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.parameters import Partitioned, join_learned, merged, partition, split_learned
from memdlm_jax.training import fit, loop, run_folder
from memdlm_jax.training import state as states
from memdlm_jax.training.loop import Result, RunData, TrainConfig
from memdlm_jax.training.optimizer import OptimizerConfig
from memdlm_jax.training.parallel import mesh_for
from memdlm_jax.training.sharding import Layout, MeshConfig
from memdlm_jax.training.state import TrainState
from memdlm_jax.training.step import StepSetup
from memdlm_jax.typing import Batch, Theta

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """All settings of a fine-tuning run.

    Attributes:
        init: model folder to start from: config.json, safetensors, tokenizer.json.
        data: sources and encoding; the tokenizer is always the model's.
        pipeline: buckets and batches, for validation too.
        optimizer: of the outer loop.
        train: the loop.
        memory: the Parametric Memory, ``None`` for a plain MDLM.
        schedule: masking of the outer loss.
        loss: weights and normalisation of the outer loss.
        lora: outer adapters; ``None`` trains all parameters. Where ``init`` holds adapters they are
            trained on, and ``lora`` must be as theirs.
        base: how parameters that are not trained are held; what is trained is float32.
        under: model folder under an ``init`` that holds adapters; empty is the one they name.
        dtype: of the activations.
        remat: what the backward pass recomputes, see ``TransformerConfig``.
        vocab_chunk: tokens of the vocabulary that the loss takes at a time; 0 takes all.
        validation_batches: batches of the validation split to score.
        mesh: how to divide parameters and rows over the devices of all processes; ``None`` for
            whole parameters on every device.
    """

    init: str
    data: DataConfig
    pipeline: PipelineConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    memory: MemoryConfig | None
    schedule: Schedule
    loss: LossConfig = PAPER_LOSS
    lora: LoraConfig | None = None
    base: _model.Base = "float32"
    under: str = ""
    dtype: _model.Dtype = "float32"
    remat: Remat = "none"
    vocab_chunk: int = 0
    validation_batches: int = 16
    mesh: MeshConfig | None = None

    def __post_init__(self):
        if not self.init:
            raise ValueError("init='' must name a model folder")
        if self.data.tokenizer:
            raise ValueError(
                f"data.tokenizer={self.data.tokenizer!r} must be empty: it is the model folder's"
            )
        if self.lora is None and self.base != "float32":
            raise ValueError(
                f"base={self.base!r} must be 'float32' without lora: all parameters are trained"
            )
        if self.validation_batches < 0:
            raise ValueError(f"validation_batches={self.validation_batches} must be at least 0")


def from_config_dict(config: config_dict.ConfigDict) -> FinetuneConfig:
    """Build the settings; ``enabled = False`` drops the rest of ``memory``, ``lora`` or ``mesh``.

    Raises:
        KeyError, TypeError, ValueError: naming the field, see ``_cli.build``.
    """
    settings = config.to_dict()
    _cli.drop_distributed(settings)
    _model.resolve(settings, "init", "under")
    for name, kind in (("memory", MemoryConfig), ("lora", LoraConfig), ("mesh", MeshConfig)):
        _cli.drop_disabled(settings, name, kind)
    return _cli.build(FinetuneConfig, settings)


def check_mesh(layout: Layout | None, config: FinetuneConfig, lengths: Sequence[int]) -> None:
    """Raise ValueError if batches of one of these lengths cannot be divided over the mesh."""
    if layout is None:
        return
    rows, accumulation = config.pipeline.rows_per_batch, config.optimizer.accumulation
    for length in lengths:
        layout.check_batch(rows, length, accumulation)


def finetune(config: FinetuneConfig) -> Result:
    """Train, resuming what is there, and export the best weights if the run came to its end."""
    mesh = mesh_for(config.mesh)
    layout = None if mesh is None else Layout(mesh.build(jax.devices()))
    shards = partitioning.row_shards(layout.mesh) if layout else jax.device_count()
    rows = max(1, config.pipeline.rows_per_batch // shards // config.optimizer.accumulation)
    if (limit := fit.device_bytes()) is not None:
        fit.require(need_of(config, rows, layout), limit)
    check_mesh(layout, config, config.pipeline.buckets or (0,))
    with run_folder.claimed(config.train.output):
        return _finetune(config, mesh, layout)


def _finetune(config: FinetuneConfig, mesh: MeshConfig | None, layout: Layout | None) -> Result:
    denoiser, theta = model_of(config, layout)
    # The others find the rows that the first process has written.
    prepared = processes.first_alone(lambda: prepared_for(config, denoiser))
    train = make_pipeline(prepared, "train", config.pipeline)
    check_mesh(layout, config, train.config.buckets)
    validation = validation_batches(prepared, config)
    logger.info("%s\n%s", prepared.describe(), train.describe())
    inner_loop = inner_loop_for(denoiser, config.memory)
    setup = StepSetup(
        denoiser, config.optimizer, inner_loop, config.schedule, loss=config.loss,
        dropout=lora.with_dropout if config.lora and config.lora.dropout else None,
    )  # fmt: skip
    data = RunData(train, validation, identity_of(config, prepared))
    state, frozen = start_of(config, denoiser, theta)
    result = loop.run(config.train, setup, state, data, frozen=frozen, mesh=mesh)
    if result.finished:
        best = loop.load_best(config.train, setup, result, data)
        folder = storage.path(config.train.output) / "best"
        trained, learned = split_learned(jax.tree.map(processes.whole, best))
        if processes.is_first():
            theta = trained if frozen is None else Partitioned(trained, frozen)
            export(folder, config, denoiser, theta)
            _memory.save(folder, config.memory, learned)
            prepared.tokenizer.save(folder / "tokenizer.json")
            logger.info("best weights (step %s) in %s", result.best_step or "last", folder)
        # JAX gives up on a process that is waited for at its exit for long.
        processes.wait_for_all()
    return result


def start_of(
    config: FinetuneConfig, denoiser: Transformer, theta: Theta
) -> tuple[TrainState, Theta]:
    """The state before the first step, and the part of theta that is not trained or ``None``."""
    # A number that no training step folds into the same seed.
    key = jax.random.fold_in(jax.random.key(config.train.seed), 2**32 - 1)
    learned = InnerLoop(denoiser, config.memory).init_learned(key) if config.memory else None
    trained, frozen = theta, None
    if isinstance(theta, Partitioned):
        trained, frozen = theta.trainable, theta.frozen
    return states.create(join_learned(trained, learned), config.optimizer), frozen


def need_of(config: FinetuneConfig, rows: int, layout: Layout | None = None) -> fit.Need:
    """What the run holds on a device with so many rows, before anything is loaded."""
    below = hugging_face.base_of(config.init, config.under or None)
    denoiser = _model.described(str(below))
    theta = _model.shapes(denoiser, config.base, config.lora)
    if isinstance(theta, Partitioned):
        return fit.needed(denoiser, theta.trainable, theta.frozen, config.memory, rows, layout)
    return fit.needed(denoiser, theta, None, config.memory, rows, layout)


def model_of(config: FinetuneConfig, layout: Layout | None = None) -> tuple[Transformer, Theta]:
    """The model to start from, divided by ``layout``; with adapters theta is ``Partitioned``.

    Raises:
        ValueError: ``init`` holds adapters, and ``lora`` is missing or says otherwise.
    """
    denoiser, theta, _ = _model.load(
        config.init, config.dtype, config.base, config.under, layout=layout
    )
    denoiser = denoiser.with_config(remat=config.remat, vocab_chunk=config.vocab_chunk)
    if hugging_face.is_adapter(config.init):
        check_adapters(config, denoiser, theta)
        theta = lora.set_dropout(theta, config.lora.dropout if config.lora else 0.0)
    elif config.lora is None:
        return denoiser, theta
    else:
        # Numbers that neither a training step nor the memory folds into the same seed.
        key = jax.random.fold_in(jax.random.key(config.train.seed), 2**32 - 2)
        theta = lora.add(key, denoiser, theta, config.lora)
    return denoiser, partition(theta, lora.is_adapter)


def check_adapters(config: FinetuneConfig, denoiser: Transformer, theta: Theta) -> None:
    """Raise ValueError if the adapters in theta are not what ``lora`` says."""
    found = peft.config_of(config.init)
    ours = config.lora and (config.lora.rank, config.lora.scale)
    if config.lora is None or ours != (found.rank, found.scale):
        raise ValueError(
            f"init={config.init} holds adapters: lora must be enabled, with rank={found.rank} and "
            f"alpha={found.alpha} (use_rslora={found.use_rslora})"
        )
    there = {p for p, leaf in lora.kernels(theta).items() if isinstance(leaf, lora.Adapted)}
    wanted = set(lora.targets(denoiser, theta, config.lora))
    if differ := sorted(there ^ wanted):
        raise ValueError(
            f"init={config.init} has adapters on other matrices than lora.target_modules="
            f"{config.lora.target_modules}: they differ in {differ}"
        )


def export(folder: Path, config: FinetuneConfig, denoiser: Transformer, theta: Theta) -> None:
    """Write a model folder, or a PEFT adapter on the base that was trained on."""
    if config.lora is None:
        hugging_face.save(folder, denoiser, theta, like=config.init)
        return
    below = storage.path(config.init)
    if hugging_face.is_adapter(below):
        below = hugging_face.base_of(below, config.under or None)
    peft.save(folder, denoiser, merged(theta), config.lora, str(storage.absolute(below)))


def prepared_for(config: FinetuneConfig, denoiser: Transformer) -> PreparedData:
    """Rows encoded with the tokenizer of the model folder.

    Raises:
        ValueError: if a row could be longer than the model is meant for.
    """
    most, buckets = denoiser.config.max_length, config.pipeline.buckets
    if buckets and buckets[-1] > most:
        end = buckets[-1]
        raise ValueError(f"pipeline.buckets end at {end}, beyond the model's max_length={most}")
    if config.data.encode.max_length > most and not buckets:
        raise ValueError(
            f"data.encode.max_length={config.data.encode.max_length} is beyond the model's "
            f"max_length={most}"
        )
    tokenizer = str(_model.tokenizer_folder(config.init, config.under))
    return prepare(dataclasses.replace(config.data, tokenizer=tokenizer))


def validation_batches(prepared: PreparedData, config: FinetuneConfig) -> list[Batch]:
    """The first batches of the validation split, in an order that the seed of training fixes.

    Raises:
        ValueError: there are none; names the remedy.
    """
    if not config.validation_batches:
        return []
    if not prepared.summary["splits"]["validation"]["rows"]:
        raise ValueError(
            f"validation_batches={config.validation_batches} must be 0: the split 'validation' has "
            f"no row in {prepared.directory}. With 0 nothing is validated and the last weights are "
            "exported; or give more data, 5 % of whose groups are for validation"
        )
    pipeline = make_pipeline(prepared, "validation", config.pipeline)
    count = min(config.validation_batches, pipeline.steps_per_epoch)
    return [pipeline.batch_at(step) for step in range(count)]


def identity_of(config: FinetuneConfig, prepared: PreparedData) -> dict[str, Any]:
    """What a resumed run must share with the first: starting weights, rows and their order."""
    return {
        "init.sha256": hugging_face.weights_digest(config.init, config.under or None),
        "base": config.base,
        "lora": None if config.lora is None else dataclasses.asdict(config.lora),
        "data.rows": prepared.directory.name,
        "pipeline.buckets": resolved(config.pipeline, prepared).buckets,
        "pipeline.rows_per_batch": config.pipeline.rows_per_batch,
        "pipeline.seed": config.pipeline.seed,
        "pipeline.supervise_padding": config.pipeline.supervise_padding,
    }


def main(config: FinetuneConfig) -> None:
    """Run from the command line; the status tells a run that a signal stopped from a whole one."""
    result = finetune(config)
    if not result.finished:
        sys.exit(f"stopped after step {result.state.step}; run the same command to go on")


if __name__ == "__main__":
    _cli.run(from_config_dict, main, "experiments/configs/finetune_needles.py")

"""Fine-tune a model folder with or without the Parametric Memory, and export the best weights.

    python -m experiments.finetune --config=experiments/configs/finetune_needles.py \
        --config.init=MODEL --config.train.output=OUTPUT

``--config.memory.enabled=False`` is the plain MDLM on the same batches with the same masks.
Running the same command again resumes. ``OUTPUT/best`` holds the weights of the step with the
lowest memory-off validation loss, in the format that every other script loads, and the settings
of the memory that they were trained with.
"""

import dataclasses
import logging
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import jax
from ml_collections import config_dict

from experiments import _cli, _memory
from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.data.pipeline import PipelineConfig, make_pipeline
from memdlm_jax.data.prepare import DataConfig, PreparedData, prepare
from memdlm_jax.diffusion.objective import PAPER_LOSS, LossConfig
from memdlm_jax.diffusion.schedule import LinearSchedule
from memdlm_jax.memory import learned
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.models.llada import LLaDA
from memdlm_jax.training import loop
from memdlm_jax.training import state as states
from memdlm_jax.training.loop import Result, TrainConfig
from memdlm_jax.training.optimizer import OptimizerConfig
from memdlm_jax.training.step import StepSetup
from memdlm_jax.typing import Batch

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
        dtype: of the activations, ``float32`` or ``bfloat16``; parameters are always float32.
        remat: recompute activations in the backward pass, layer by layer.
        validation_batches: batches of the validation split to score.
    """

    init: str
    data: DataConfig
    pipeline: PipelineConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    memory: MemoryConfig | None
    schedule: LinearSchedule
    loss: LossConfig = PAPER_LOSS
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    validation_batches: int = 16

    def __post_init__(self):
        if not self.init:
            raise ValueError("init='' must name a model folder")
        if self.data.tokenizer:
            raise ValueError(
                f"data.tokenizer={self.data.tokenizer!r} must be empty: it is the model folder's"
            )
        if self.validation_batches < 0:
            raise ValueError(f"validation_batches={self.validation_batches} must be at least 0")


def from_config_dict(config: config_dict.ConfigDict) -> FinetuneConfig:
    """Build the settings; ``memory.enabled = False`` drops the rest of ``memory``.

    Raises:
        KeyError, TypeError, ValueError: naming the field, see ``_cli.build``.
    """
    settings = config.to_dict()
    memory = settings.get("memory") or {}
    enabled = memory.pop("enabled", True)
    if type(enabled) is not bool:
        raise TypeError(f"config.memory.enabled={enabled!r} must be bool")
    if not enabled:
        _cli.build(MemoryConfig, memory, "config.memory")  # a typo is an error all the same
        settings["memory"] = None
    return _cli.build(FinetuneConfig, settings)


def finetune(config: FinetuneConfig) -> Result:
    """Train, resuming what is there, and export the best weights if the run came to its end."""
    denoiser, theta = hugging_face.load(config.init)
    model = dataclasses.replace(denoiser.config, dtype=config.dtype, remat=config.remat)
    denoiser = LLaDA(model)
    prepared = prepared_for(config, denoiser)
    train = make_pipeline(prepared, "train", config.pipeline)
    validation = validation_batches(prepared, config)
    logger.info("%s\n%d steps an epoch", prepared.describe(), train.steps_per_epoch)
    memory = config.memory
    setup = StepSetup(denoiser, config.optimizer, memory, config.schedule, loss=config.loss)
    identity = identity_of(config, prepared)
    # A number that no training step folds into the same seed.
    key = jax.random.fold_in(jax.random.key(config.train.seed), 2**32 - 1)
    inner = learned.init(key, denoiser, memory) if memory else None
    state = states.create(learned.join(theta, inner), config.optimizer)
    result = loop.run(config.train, setup, state, train, validation, identity)
    if result.finished:
        best = loop.load_best(config.train, setup, result, validation, identity)
        folder = Path(config.train.output) / "best"
        theta, inner = learned.split(best)
        hugging_face.save(folder, denoiser, theta)
        _memory.save(folder, memory, inner)
        shutil.copyfile(Path(config.init) / "tokenizer.json", folder / "tokenizer.json")
        logger.info("best weights (step %s) in %s", result.best_step or "last", folder)
    return result


def prepared_for(config: FinetuneConfig, denoiser: LLaDA) -> PreparedData:
    """Rows encoded with the tokenizer of the model folder.

    Raises:
        ValueError: if tokenizer and model disagree on vocabulary or mask token, or if a row could
            be longer than the model is meant for.
    """
    tokenizer_file = str(Path(config.init) / "tokenizer.json")
    prepared = prepare(dataclasses.replace(config.data, tokenizer=tokenizer_file))
    tokenizer, model = prepared.tokenizer, denoiser.config
    if tokenizer.mask_id != model.mask_token_id or tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"{tokenizer_file} has mask id {tokenizer.mask_id} and {tokenizer.vocab_size} ids, the "
            f"model has mask id {model.mask_token_id} and {model.vocab_size} ids"
        )
    longest = config.pipeline.buckets[-1]
    if longest > model.max_length:
        raise ValueError(
            f"pipeline.buckets end at {longest}, beyond the model's max_length={model.max_length}"
        )
    return prepared


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
        "init.sha256": hugging_face.weights_digest(config.init),
        "data.rows": prepared.directory.name,
        "pipeline.buckets": config.pipeline.buckets,
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

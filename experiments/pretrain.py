"""Pretrain a small denoiser until it retrieves, and export it as a model folder.

    python -m experiments.pretrain --config=experiments/configs/tiny_pretrain.py

Running the same command again resumes, and a larger ``--config.train.steps`` goes on.
``--config.start=MODEL`` starts from a model folder instead of fresh weights. The newest measured
weights are in OUTPUT/model, in the format that every other script loads.
"""

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import config_dict

from experiments import _cli
from memdlm_jax import processes, storage
from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.data.needles import NeedleConfig
from memdlm_jax.data.pretraining import PretrainingConfig
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion.schedule import Schedule
from memdlm_jax.evaluation import needles
from memdlm_jax.evaluation.needles import NeedleSuite
from memdlm_jax.evaluation.systems import System
from memdlm_jax.models import induction
from memdlm_jax.models.induction import InductionInit
from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.training import loop, pretraining, run_folder
from memdlm_jax.training import state as states
from memdlm_jax.training.loop import Result, RunData, TrainConfig
from memdlm_jax.training.optimizer import OptimizerConfig
from memdlm_jax.training.pretraining import PretrainingData
from memdlm_jax.training.sharding import MeshConfig
from memdlm_jax.training.step import StepSetup
from memdlm_jax.typing import Theta

logger = logging.getLogger(__name__)

PROBE_WINDOW = 4
"""Tokens in which the probe's questions are answered: a value of three digits and its end."""


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """All settings of a pretraining run.

    Attributes:
        model: sizes; its vocabulary and mask token must be the tokenizer's.
        train: the loop.
        optimizer: of the outer step.
        data: the mixture.
        schedule: masking of running text.
        induction: structured initialisation, or ``None`` for an ordinary one.
        start: model folder to start from instead of fresh parameters.
        tokenizer: its file; trained and stored there if missing. Empty is OUTPUT/tokenizer.json.
        validation_batches: held-out batches, text and needles.
        probe: needle questions asked at every validation, with words and filler of their own.
        mesh: how to divide parameters and rows over the devices of all processes; ``None`` for
            whole parameters on every device.
    """

    model: LLaDAConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    data: PretrainingConfig
    schedule: Schedule
    induction: InductionInit | None = None
    start: str = ""
    tokenizer: str = ""
    validation_batches: int = 12
    probe: NeedleSuite = dataclasses.field(
        default_factory=lambda: NeedleSuite(task=NeedleConfig(split="validation"))
    )
    mesh: MeshConfig | None = None

    def __post_init__(self):
        if self.validation_batches < 0:
            raise ValueError(f"validation_batches={self.validation_batches} must be at least 0")
        if self.model.max_length < max(self.data.needle_lengths, default=0):
            raise ValueError(
                f"data.needle_lengths={self.data.needle_lengths} go beyond model.max_length="
                f"{self.model.max_length}"
            )


def from_config_dict(config: config_dict.ConfigDict) -> PretrainConfig:
    """Build the settings.

    ``induction.enabled = False`` asks for an ordinary initialisation, ``mesh.enabled = False`` for
    no mesh.

    Raises:
        KeyError, TypeError, ValueError: naming the field, see ``_cli.build``.
    """
    settings = config.to_dict()
    _cli.drop_distributed(settings)
    structured = settings.get("induction") or {"enabled": False}
    if not structured.pop("enabled", True):
        settings["induction"] = None
    _cli.drop_disabled(settings, "mesh", MeshConfig)
    return _cli.build(PretrainConfig, settings)


def run(config: PretrainConfig) -> tuple[Path, Result]:
    """Train, resuming what is there, and return the exported model folder and the last state."""
    with run_folder.claimed(config.train.output):
        return _run(config)


def _run(config: PretrainConfig) -> tuple[Path, Result]:
    output = storage.path(config.train.output)
    tokenizer_file = storage.path(config.tokenizer or output / "tokenizer.json")
    tokenizer = processes.first_alone(
        lambda: pretraining.tokenizer_at(
            tokenizer_file, config.model.vocab_size, config.data.source
        )
    )
    _check_vocabulary(config.model, tokenizer)
    denoiser = LLaDA(config.model)
    data = pretraining.load_data(config.data, tokenizer, config.validation_batches)
    setup = StepSetup(
        denoiser, config.optimizer, schedule=config.schedule,
        corruption=pretraining.AnswersWhole(config.schedule),
    )  # fmt: skip
    given = RunData(data.train, data.validation, identity_of(config, data))
    state = states.create(first_theta(config, denoiser), config.optimizer)
    probe = needle_probe(config.probe, denoiser, tokenizer, data.held_out_sentences, output)
    result = loop.run(config.train, setup, state, given, probe, mesh=config.mesh)
    theta = jax.tree.map(processes.whole, result.state.theta)
    if processes.is_first():
        export(output / "model", denoiser, theta, tokenizer)
    processes.wait_for_all()  # JAX does not wait long for a process at its exit.
    return output / "model", result


def identity_of(config: PretrainConfig, data: PretrainingData) -> dict[str, Any]:
    """What a resumed run must share with the first: how it began, what it reads in which order."""
    settings = {f"data.{k}": v for k, v in dataclasses.asdict(config.data).items()}
    start = hugging_face.weights_digest(config.start) if config.start else None
    # A model folder is taken as it is: the initialisation has no part in it.
    drawn = config.induction if start is None else None
    return (
        settings
        | data.identity
        | {
            "start.sha256": start,
            "induction": None if drawn is None else dataclasses.asdict(drawn),
        }
    )


def first_theta(config: PretrainConfig, denoiser: LLaDA) -> Theta:
    """Parameters before the first step."""
    if config.start:
        loaded, theta = hugging_face.load(config.start, config.model.param_dtype)
        if loaded.config != config.model:
            raise ValueError(f"start={config.start} has {loaded.config}, not {config.model}")
        return theta
    key = jax.random.key(config.train.seed)
    if config.induction is None:
        return denoiser.init(key)
    return induction.init(key, denoiser, config.induction)


def needle_probe(
    suite: NeedleSuite, denoiser: LLaDA, tokenizer: Tokenizer, sentences: list[str], output: Path
) -> Callable[[Theta], Mapping[str, float]]:
    """Measure needle accuracy of every cell, and export the weights that were measured.

    Of several processes the first does, and the others have nothing to report.

    Raises:
        ValueError: if an answer is longer than the window of ``PROBE_WINDOW`` tokens.
    """
    episodes = needles.draw_episodes(suite, tokenizer, sentences)
    needles.check_window(episodes, tokenizer, PROBE_WINDOW)

    def probe(theta: Theta) -> Mapping[str, float]:
        theta = jax.tree.map(processes.whole, theta)
        if not processes.is_first():
            return {}
        export(output / "model", denoiser, theta, tokenizer)
        system = System("mdlm", denoiser, theta)
        scores = {}
        for task, asked in episodes.items():
            answer = needles.answerer(
                system, tokenizer, needles.left_to_right(PROBE_WINDOW),
                max_length=task.length + 8, batch_size=20,
            )  # fmt: skip
            outcomes = needles.evaluate_cell(asked, answer)
            name = f"needles_{task.length}_{task.num_keys}"
            scores[name] = sum(o.score for o in outcomes) / len(outcomes)
            scores[f"{name}_in_context"] = sum(o.in_context for o in outcomes) / len(outcomes)
        return scores

    return probe


def export(folder: Path, denoiser: LLaDA, theta: Theta, tokenizer: Tokenizer) -> Path:
    """Write weights, config and tokenizer as a model folder."""
    hugging_face.save(folder, denoiser, theta)
    tokenizer.save(folder / "tokenizer.json")
    return folder


def _check_vocabulary(model: LLaDAConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size != model.vocab_size:
        raise ValueError(
            f"model.vocab_size={model.vocab_size} must be the tokenizer's {tokenizer.vocab_size}"
        )
    if tokenizer.mask_id != model.mask_token_id:
        raise ValueError(
            f"model.mask_token_id={model.mask_token_id} must be the tokenizer's {tokenizer.mask_id}"
        )


def main(config: PretrainConfig) -> None:
    """Run from the command line; the status tells a run that a signal stopped from a whole one."""
    folder, result = run(config)
    logger.info("weights in %s", folder)
    if not result.finished:
        sys.exit(f"stopped after step {result.state.step}; run the same command to go on")


if __name__ == "__main__":
    _cli.run(from_config_dict, main, "experiments/configs/tiny_pretrain.py")

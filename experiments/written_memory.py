"""Train a model to read a text once, and to answer when the text is gone.

    python -m experiments.written_memory --config=experiments/configs/written_memory.py

An inner loop writes the text into fast weights; the outer loss asks about it without the text. The
config is a list of stages of rising difficulty. Running the same command again resumes. The log
shows, on held-out texts, how many answers are right with the memory of the own text (``on``),
without memory (``off``) and with the memory of another text (``other``). ``OUTPUT/model`` is a
model folder that remembers how its memory was trained; ``OUTPUT/results.json`` has the table on
the test split. ``--config.model=FOLDER`` measures a model folder instead.
"""

import dataclasses
import itertools
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import config_dict

from experiments import _cli, _memory, _model
from memdlm_jax import processes, storage
from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.data import sources
from memdlm_jax.data.episodes import EpisodeBatches, EpisodeConfig, NeedleEpisodes, VisibleRows
from memdlm_jax.data.example import Example
from memdlm_jax.data.filler import Filler
from memdlm_jax.data.needles import NeedleConfig, NeedleTask
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion.objective import WholeAnswers
from memdlm_jax.diffusion.schedule import LinearSchedule
from memdlm_jax.evaluation import written
from memdlm_jax.evaluation.episode_tasks import TaskConfig, episodes_of
from memdlm_jax.evaluation.statistics import wilson_interval
from memdlm_jax.evaluation.systems import System
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.parameters import join_learned, split_learned
from memdlm_jax.training import loop
from memdlm_jax.training import state as states
from memdlm_jax.training.loop import RunData, TrainConfig
from memdlm_jax.training.optimizer import OptimizerConfig
from memdlm_jax.training.step import StepSetup
from memdlm_jax.typing import Batch, Theta

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PartConfig:
    """One kind of batches.

    Attributes:
        task: what the episodes are about.
        batch: their sizes and the weights of their tokens.
        name: of a row of results; empty is the task's.
    """

    task: TaskConfig
    batch: EpisodeConfig
    name: str = ""

    def __post_init__(self):
        if self.batch.questions != self.task.questions:
            raise ValueError(
                f"batch.questions={self.batch.questions} must be task.questions="
                f"{self.task.questions}"
            )


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """A stage of the curriculum.

    Attributes:
        steps: optimiser steps.
        parts: batches to train on, in turn.
        visible: a batch of ordinary rows, with their context visible, after so many others; 0 for
            none. They keep what the model could do before.
    """

    steps: int
    parts: tuple[PartConfig, ...]
    visible: int = 0

    def __post_init__(self):
        if self.steps < 1 or not self.parts:
            raise ValueError(f"steps={self.steps} must be at least 1, and parts must not be empty")
        if self.visible < 0:
            raise ValueError(f"visible={self.visible} must be at least 0")


@dataclasses.dataclass(frozen=True)
class VisibleConfig:
    """Ordinary rows: needles in their context, and conversations.

    Attributes:
        rows: of a batch.
        length: tokens of a row.
        keys: needles of a context, one row for each number.
        needles: examples of each number of keys; as many in all are from conversations.
    """

    rows: int = 8
    length: int = 320
    keys: tuple[int, ...] = (4, 8, 12)
    needles: int = 1000


@dataclasses.dataclass(frozen=True)
class WrittenMemoryConfig:
    """All settings of a run.

    Attributes:
        init: model folder to start from, its learned inner loop included.
        memory: how texts are written.
        optimizer: of the outer loop; ``total_steps`` is the sum of the stages'.
        train: the loop; ``steps`` likewise.
        stages: the curriculum.
        evaluate: rows of the table, measured on the test split.
        episodes: texts of each row.
        held_out: what the log measures during training, on the validation split.
        probe: texts of each of these.
        least: see ``WholeAnswers``.
        visible: rows with their context visible.
        model: model folder to measure; empty trains one and measures it.
    """

    init: str
    memory: MemoryConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    stages: tuple[StageConfig, ...]
    evaluate: tuple[PartConfig, ...] = ()
    episodes: int = 125
    held_out: tuple[PartConfig, ...] = ()
    probe: int = 32
    least: float = 1.0
    visible: VisibleConfig = dataclasses.field(default_factory=VisibleConfig)
    model: str = ""

    def __post_init__(self):
        if not self.init:
            raise ValueError("init='' must name a model folder")
        if not 0 < self.least <= 1:
            raise ValueError(f"least={self.least} must be in (0, 1]")
        for part in self.parts:
            if part.batch.segment != self.memory.prompt_chunk:
                raise ValueError(
                    f"batch.segment={part.batch.segment} must be memory.prompt_chunk="
                    f"{self.memory.prompt_chunk}: texts are written in training as at inference"
                )

    @property
    def parts(self) -> list[PartConfig]:
        """All kinds of batches."""
        staged = [part for stage in self.stages for part in stage.parts]
        return [*staged, *self.held_out, *self.evaluate]


def from_config_dict(config: config_dict.ConfigDict) -> WrittenMemoryConfig:
    """Build the settings.

    Raises:
        KeyError, TypeError, ValueError: naming the field, see ``_cli.build``.
    """
    settings = config.to_dict()
    _cli.drop_distributed(settings)
    _model.resolve(settings, "init")
    if not settings.get("stages"):
        raise ValueError("config.stages=() must have at least one stage")
    total = sum(stage.get("steps", 0) for stage in settings["stages"])
    settings["optimizer"]["total_steps"] = settings["train"]["steps"] = total
    return _cli.build(WrittenMemoryConfig, settings)


class Curriculum:
    """The batches of all stages, one after the other; ``training.feed.Batches``."""

    def __init__(
        self, stages: Sequence[tuple[StageConfig, Sequence[EpisodeBatches]]], visible: VisibleRows
    ):
        """Keep the kinds of batches of every stage, and the rows with their context visible."""
        self._stages, self._visible = stages, visible

    def batch_at(self, step: int) -> Batch:
        """The batch of a step; a stage takes its kinds of batches in turn."""
        for stage, kinds in self._stages:
            if step < stage.steps:
                place = step
                if stage.visible:
                    rounds, rest = divmod(step, stage.visible + 1)
                    if rest == stage.visible:
                        return self._visible.batch_at(step)
                    place -= rounds
                return kinds[place % len(kinds)].batch_at(step)
            step -= stage.steps
        raise IndexError(f"step {step} is behind the last stage")

    def target_capacity(self, length: int) -> int:
        """Target slots of rows of this length."""
        kinds = [kind for _, kinds in self._stages for kind in kinds]
        found = [kind.target_capacity(length) for kind in kinds if kind.config.length == length]
        if self._visible.length == length:
            found.append(self._visible.target_capacity(length))
        return max(found)


def visible_examples(config: VisibleConfig, tokenizer: Tokenizer) -> list[Example]:
    """Needles asked with their context, in RULER's words and ours, and turns of conversations."""
    filler = Filler(sources.chitchat_sentences("train"), tokenizer)
    found: list[Example] = []
    for keys in config.keys:
        needles = NeedleConfig(length=config.length, num_keys=keys, split="train")
        found += sources.needle_examples(NeedleTask(needles, tokenizer, filler), 0, config.needles)
        short = tuple(s for s in sources.chitchat_sentences("train") if len(s.split()) < 15)
        texts = NeedleEpisodes(keys, config.length - 64, 1, "train", tokenizer, short)
        episodes = (texts.episode(0, i) for i in range(config.needles))
        found += [written.with_context(e, q) for e in episodes for q in e.questions if q.prompt]
    return found + list(itertools.islice(sources.chitchat_examples("train"), len(found)))


def train(config: WrittenMemoryConfig) -> loop.Result:
    """Train through all stages, resuming, and export ``OUTPUT/model``."""
    denoiser, theta, tokenizer = _model.load(config.init, "float32")
    inner_loop = InnerLoop(denoiser, config.memory)

    def batches(part: PartConfig, split="train") -> EpisodeBatches:
        return EpisodeBatches(episodes_of(part.task, split, tokenizer), tokenizer, part.batch)

    # Every stage draws episodes of its own.
    first = 1000 * config.train.seed
    stages = [
        (stage, [batches(_seeded(part, first + number)) for part in stage.parts])
        for number, stage in enumerate(config.stages)
    ]
    for _, kinds in stages:
        for kind in kinds:
            kind.batch_at(0)  # What does not fit is an error before anything is trained.
    v = config.visible
    visible = VisibleRows(
        visible_examples(v, tokenizer), tokenizer,
        rows=v.rows, length=v.length, segment=config.memory.prompt_chunk, seed=config.train.seed,
    )  # fmt: skip
    curriculum = Curriculum(stages, visible)
    held_out = [batches(part, "validation") for part in config.held_out]
    validation = [plain.batch_of(_some(plain, plain.config.texts)) for plain in held_out]
    key = jax.random.fold_in(jax.random.key(config.train.seed), 2**32 - 1)
    learned = inner_loop.init_learned(key)
    if (storage.path(config.init) / _memory.PARAMETERS).exists():
        learned = _memory.inner_parameters(config.init, denoiser, config.memory)
    start = states.create(join_learned(theta, learned), config.optimizer)
    corruption = WholeAnswers(LinearSchedule(), config.least)
    setup = StepSetup(denoiser, config.optimizer, inner_loop, corruption=corruption)
    identity = {
        "init.sha256": hugging_face.weights_digest(config.init, None),
        "stages": json.dumps([dataclasses.asdict(stage) for stage in config.stages]),
        "visible": json.dumps(dataclasses.asdict(config.visible)),
    }

    def probe(parameters: Theta) -> Mapping[str, float]:
        found: dict[str, float] = {}
        for part, kind in zip(config.held_out, held_out, strict=True):
            system = _system(denoiser, inner_loop, parameters)
            longest = denoiser.config.max_length
            right = _ask(system, kind, config.probe, longest, ("on", "off", "other"))
            name = part.name or part.task.name
            found |= {f"{name}/{way}": one.accuracy for way, one in right.items()}
        said = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        logger.info("held out: %s", said)
        return found

    data = RunData(curriculum, validation, identity)
    result = loop.run(config.train, setup, start, data, probe)
    if result.finished:
        trained, learned = split_learned(jax.tree.map(processes.whole, result.state.theta))
        if processes.is_first():
            folder = storage.path(config.train.output) / "model"
            hugging_face.save(folder, denoiser, trained, like=config.init)
            _memory.save(folder, config.memory, learned)
            tokenizer.save(folder / "tokenizer.json")
            logger.info("model in %s", folder)
    return result


def _seeded(part: PartConfig, seed: int) -> PartConfig:
    return dataclasses.replace(part, batch=dataclasses.replace(part.batch, seed=seed))


def _some(kind: EpisodeBatches, count: int):
    return [kind.episodes.episode(1, i) for i in range(count)]


def _system(denoiser: Transformer, inner_loop: InnerLoop, parameters: Any) -> System:
    theta, learned = split_learned(parameters)
    return System("memdlm", denoiser, theta, inner_loop, learned)


def _ask(
    system: System, kind: EpisodeBatches, count: int, longest: int, ways: Sequence[written.Way]
) -> dict[written.Way, written.Right]:
    episodes = _some(kind, count)
    decoding = written.decoding(kind.tokenizer, episodes)
    return written.Asker(system, kind, decoding, longest).ask(episodes, ways)


def evaluate(config: WrittenMemoryConfig, tokenizer: Tokenizer, system: System, longest: int):
    """The table on the test split: one row for each of ``config.evaluate``."""
    rows = []
    for part in config.evaluate:
        kind = EpisodeBatches(episodes_of(part.task, "test", tokenizer), tokenizer, part.batch)
        ways: list[written.Way] = ["on", "off", "other"]
        if part.batch.segments * part.batch.segment + part.batch.length < longest:
            ways.append("context")
        right = _ask(system, kind, config.episodes, longest, ways)
        name = part.name or part.task.name
        row: dict[str, Any] = {"task": name, "n": len(right["on"].correct)}
        row["guessing"] = written.guessing(_some(kind, config.episodes))
        for way, one in right.items():
            low, high = wilson_interval(int(one.correct.sum()), len(one.correct))
            row[way] = {"right": one.accuracy, "low": low, "high": high}
        logger.info("%s", json.dumps(row))
        rows.append(row)
    return rows


def measure(model: str, config: WrittenMemoryConfig) -> list[dict[str, Any]]:
    """The table of a model folder, which writes as it was trained to.

    Raises:
        ValueError: it was trained with segments of another length than the table's.
    """
    denoiser, theta, tokenizer = _model.load(model, "float32")
    memory = _memory.settings(model, {})
    if memory.prompt_chunk != config.memory.prompt_chunk:
        raise ValueError(
            f"model={model!r} writes segments of memory.prompt_chunk={memory.prompt_chunk} tokens, "
            f"must be {config.memory.prompt_chunk} as in the config"
        )
    learned = _memory.inner_parameters(model, denoiser, memory)
    system = System("memdlm", denoiser, theta, InnerLoop(denoiser, memory), learned)
    return evaluate(config, tokenizer, system, denoiser.config.max_length)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of ``measure`` as text: right answers in per cent."""
    ways = ("on", "off", "other", "context")
    lines = [("task", "n", *ways, "guessing")]
    for row in rows:
        shares = [100 * row[way]["right"] if way in row else None for way in ways]
        cells = ["-" if share is None else f"{share:.1f}" for share in shares]
        lines.append((row["task"], str(row["n"]), *cells, f"{100 * row['guessing']:.1f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])])
        for cells in lines
    )


def main(config: WrittenMemoryConfig) -> None:
    """Train, then measure on the test split; with ``model`` only measure."""
    folder = storage.path(config.train.output)
    if not config.model:
        result = train(config)
        if not result.finished:
            sys.exit(f"stopped after step {result.state.step}; run the same command to go on")
    rows = measure(config.model or str(folder / "model"), config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("right answers in %, the text absent (context: the text is shown, no memory)")
    print(table(rows))


if __name__ == "__main__":
    _cli.run(
        from_config_dict,
        main,
        "experiments/configs/written_memory.py",
        alone="it asks on one device",
    )

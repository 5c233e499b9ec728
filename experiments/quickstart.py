"""From the shipped denoiser to a report: fine-tune with and without memory, compare, show.

    python -m experiments.quickstart --config=experiments/configs/quickstart.py

Prepares the data, fine-tunes ``mdlm`` and ``memdlm`` on the same batches with the same masks, asks
the three systems the same questions, and writes ``report.html`` and ``results.json`` to the output
folder. Running it again takes up where it stopped: a finished stage is read back as long as its
settings are the same, and an unfinished training resumes from its checkpoint.
"""

import dataclasses
import functools
import importlib.resources
import itertools
import json
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from experiments import _cli, _stages, evaluate, finetune
from experiments._evaluation import EvaluateConfig
from experiments.finetune import FinetuneConfig
from memdlm_jax import storage
from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.data import sources
from memdlm_jax.data.corpora import SourceConfig
from memdlm_jax.evaluation import figures, report
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.training.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """All settings of a run.

    Attributes:
        output: folder of the report and of everything on the way to it.
        finetune: training with memory; without it, everything else is the same. Its data are
            ``conversations`` conversations of the chitchat corpus beside the configured sources.
        evaluate: the comparison; the model folders are those that were trained.
        conversations: how many.
    """

    output: str
    finetune: FinetuneConfig
    evaluate: EvaluateConfig
    conversations: int

    def __post_init__(self):
        if self.conversations < 1:
            raise ValueError(f"conversations={self.conversations} must be at least 1")
        if self.finetune.memory is None:
            raise ValueError("finetune.memory=None must be set: one of the two runs has a memory")


def from_config_dict(config: config_dict.ConfigDict) -> QuickstartConfig:
    """Build the settings; ``memory`` holds for training and inference, ``model`` is the start.

    An empty ``finetune.data.directory`` is OUTPUT/data.

    Raises:
        KeyError, TypeError, ValueError: naming the field, see ``_cli.build``.
    """
    settings = config.to_dict()
    output, model, memory = (settings.pop(name) for name in ("output", "model", "memory"))
    if not output:
        raise ValueError("config.output='' must name a folder")
    tuning, evaluation = settings["finetune"], evaluate.without_disabled(settings["evaluate"])
    tuning |= {"init": model or shipped_model(), "memory": dict(memory)}
    _cli.drop_disabled(tuning, "mesh", MeshConfig)
    tuning["train"]["output"] = output
    tuning["data"]["directory"] = tuning["data"]["directory"] or str(storage.path(output) / "data")
    evaluation |= {"output": output, "memory": memory}
    return _cli.build(QuickstartConfig, settings | {"output": output})


def shipped_model() -> str:
    """Folder of the denoiser that comes with the package."""
    return str(importlib.resources.files("memdlm_jax") / "assets" / "tiny")


def run(config: QuickstartConfig) -> Path:
    """Do all stages that are not yet done and return the report's path."""
    config = with_conversations(config)
    provenance = evaluate.provenance("experiments.quickstart", config)
    runs = {"mdlm": None, "memdlm": config.finetune.memory}
    trained = {name: fine_tuned(config, name, memory) for name, memory in runs.items()}
    folders = {name: folder for name, (folder, _) in trained.items()}
    asked = dataclasses.replace(
        config.evaluate, mdlm=str(folders["mdlm"] / "best"), memdlm=str(folders["memdlm"] / "best")
    )
    note = (
        storage.path(config.output) / f"evaluation-{_stages.digest(dataclasses.asdict(asked))}.json"
    )
    measured, _ = _stages.stage(note, functools.partial(evaluate.measure, asked))
    seconds = {f"fine-tuning {name}": taken for name, (_, taken) in trained.items()}
    seconds |= measured.pop("seconds")
    results = {
        "title": "Quickstart: MDLM and MemDLM on a small denoiser",
        "run": provenance | {"seconds": seconds, "notes": [_what_it_shows(config)]},
        "curves": {name: figures.read_curve(f / "metrics.jsonl") for name, f in folders.items()},
    } | measured
    print(evaluate.table(results))
    return report.write(config.output, results)


def with_conversations(config: QuickstartConfig) -> QuickstartConfig:
    """Write the first conversations of the corpus as JSON lines and add them to the sources."""
    folder = storage.path(config.finetune.data.directory)
    path = folder / f"conversations-{config.conversations}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        answered = (talk for talk in sources.chitchat_turns() if len(talk[1]) > 1)
        talks = itertools.islice(answered, config.conversations)
        with storage.replacing(path) as file:
            file.write_text("".join(json.dumps(_as_messages(*talk)) + "\n" for talk in talks))
    added = SourceConfig("jsonl", path=str(path))
    data = dataclasses.replace(config.finetune.data, sources=(*config.finetune.data.sources, added))
    tuning = dataclasses.replace(config.finetune, data=data)
    return dataclasses.replace(config, finetune=tuning)


def _as_messages(group: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    """A conversation whose last speaker is the assistant; its group keeps its split."""
    roles = {True: "assistant", False: "user"}
    messages = [{"role": roles[who == turns[-1][0]], "content": text} for who, text in turns]
    return {"messages": messages, "group": group}


def fine_tuned(
    config: QuickstartConfig, name: str, memory: MemoryConfig | None
) -> tuple[Path, float]:
    """Folder of a training run, and the seconds it took; trains unless that is done."""
    tuning = dataclasses.replace(config.finetune, memory=memory)
    weights = hugging_face.weights_digest(tuning.init)
    key = _stages.digest([dataclasses.asdict(tuning), weights])
    folder = storage.path(config.output) / f"{name}-{key}"
    train = dataclasses.replace(tuning.train, output=str(folder))
    settings = dataclasses.replace(tuning, train=train)
    _, seconds = _stages.stage(folder / "finished.json", functools.partial(train_fully, settings))
    return folder, seconds


def train_fully(config: FinetuneConfig) -> None:
    """Fine-tune to the last step; ends the program if a signal stopped the training."""
    finetune.main(config)


def _what_it_shows(config: QuickstartConfig) -> str:
    steps, rows = config.finetune.train.steps, config.finetune.pipeline.rows_per_batch
    return (
        f"Both models took {steps} steps of {rows} rows from the same start, in the same order "
        f"with the same masks (one training seed: {config.finetune.train.seed}). Intervals are "
        "over questions and rows, not over training seeds. The task is RULER-style and local: "
        "its numbers do not compare with published tables."
    )


def main(config: QuickstartConfig) -> None:
    """Run from the command line."""
    print(f"report: {run(config)}")


if __name__ == "__main__":
    _cli.run(from_config_dict, main, "experiments/configs/quickstart.py")

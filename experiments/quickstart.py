"""See memory answer, train it, and compare the three systems: one command, one report.

    python -m experiments.quickstart --config=experiments/configs/quickstart.py

1. The shipped reader writes texts into its weights and answers questions without the texts.
2. The plain denoiser learns to do so: a short training with exact meta-gradients, and the same with
   first-order ones.
3. ``mdlm`` and ``memdlm`` are fine-tuned on the same batches with the same masks, and the three
   systems are asked the same questions with the text in the context.

``report.html`` and ``results.json`` are in the output folder. Running it again takes up where it
stopped: a finished stage is read back as long as its settings are the same, and an unfinished
training resumes from its checkpoint.
"""

import dataclasses
import functools
import importlib.resources
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from experiments import _cli, _stages, evaluate, finetune, written_memory
from experiments._evaluation import EvaluateConfig
from experiments.finetune import FinetuneConfig
from experiments.written_memory import WrittenMemoryConfig
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
        reader: model folder that answers from memory.
        written: the short training of step 2; its memory settings, but for the meta-gradient, and
            its table are those of the reader too.
    """

    output: str
    finetune: FinetuneConfig
    evaluate: EvaluateConfig
    conversations: int
    reader: str
    written: WrittenMemoryConfig

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
    settings["reader"] = settings["reader"] or shipped_model("reader")
    total = sum(stage.get("steps", 0) for stage in settings["written"]["stages"])
    settings["written"] |= {"init": tuning["init"]}
    settings["written"]["train"] |= {"output": output, "steps": total}
    settings["written"]["optimizer"]["total_steps"] = total
    return _cli.build(QuickstartConfig, settings | {"output": output})


def shipped_model(name: str = "tiny") -> str:
    """Folder of a model that comes with the package: the plain denoiser, or the ``reader``."""
    return str(importlib.resources.files("memdlm_jax") / "assets" / name)


def run(config: QuickstartConfig) -> Path:
    """Do all stages that are not yet done and return the report's path."""
    config = with_conversations(config)
    provenance = evaluate.provenance("experiments.quickstart", config)
    written, written_seconds = answers_from_memory(config)
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
    seconds = dict(written_seconds)
    seconds |= {f"fine-tuning {name}": taken for name, (_, taken) in trained.items()}
    seconds |= measured.pop("seconds")
    results = {
        "title": "Quickstart: MDLM and MemDLM on a small denoiser",
        "run": provenance | {"seconds": seconds, "notes": [_what_it_shows(config)]},
        "written": written,
        "curves": {name: figures.read_curve(f / "metrics.jsonl") for name, f in folders.items()},
    } | measured
    print(evaluate.table(results))
    return report.write(config.output, results)


def answers_from_memory(config: QuickstartConfig) -> tuple[dict[str, Any], dict[str, float]]:
    """What the reader answers, and how two trainings learn to; and the seconds of each."""
    asked, root = config.written, storage.path(config.output)
    key = _stages.digest([dataclasses.asdict(asked), hugging_face.weights_digest(config.reader)])
    ask = functools.partial(written_memory.measure, config.reader, asked)
    rows, taken = _stages.stage(root / f"reader-{key}.json", ask)
    print("The shipped reader has read texts. It answers without them; right answers in %:")
    print(written_memory.table(rows), flush=True)
    curves, seconds = {}, {"asking the reader": taken}
    for rule in ("exact", "first_order"):
        folder = root / f"written-{rule}-{key}"
        memory = dataclasses.replace(asked.memory, meta_gradient=rule)
        train = dataclasses.replace(asked.train, output=str(folder))
        run = functools.partial(_learn, dataclasses.replace(asked, memory=memory, train=train))
        curves[rule], seconds[f"learning to write, {rule}"] = _stages.stage(
            folder / "finished.json", run
        )
        last = curves[rule][-1]
        print(f"{rule}: {100 * last['on']:.1f} % right after {last['step']} steps", flush=True)
    return {"table": rows, "curves": curves, "chance": rows[0]["guessing"]}, seconds


def _learn(config: WrittenMemoryConfig) -> list[dict[str, float]]:
    """Train, and read back how right answers rose; ends the program if a signal stopped it."""
    result = written_memory.train(config)
    if not result.finished:
        sys.exit(f"stopped after step {result.state.step}; run the same command to go on")
    task = config.held_out[0].task.name
    lines = (storage.path(config.train.output) / "metrics.jsonl").read_text().splitlines()
    found = [(line["step"], line.get(f"validation/{task}/on")) for line in map(json.loads, lines)]
    return [{"step": step, "on": on} for step, on in found if on is not None]


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

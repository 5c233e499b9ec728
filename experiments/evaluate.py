"""Compare fine-tuned models: needle accuracy, held-out loss, replies; as JSON, table and report.

    python -m experiments.evaluate --config=experiments/configs/evaluate.py \
        --config.mdlm=MODEL --config.memdlm=MODEL --config.output=runs/evaluate

``mdlm`` and ``memdlm`` are model folders; the latter is measured with memory off
(``memdlm_train_only``) and with each prompt written into memory (``memdlm``). One may be left out.
Several processes (``--config.distributed``) share out the questions and the held-out rows.
"""

import dataclasses
import functools
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import config_dict

from experiments import _cli, _evaluation, _measures, _memory, _model
from experiments._evaluation import EvaluateConfig, Loaded
from memdlm_jax import processes, storage
from memdlm_jax.data.corpora import installed_version
from memdlm_jax.evaluation import report
from memdlm_jax.evaluation.asking import Answers

PACKAGES = ("memdlm_jax", "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "chitchat-dataset")


def from_config_dict(config: config_dict.ConfigDict) -> EvaluateConfig:
    """Build the settings; each part (``needles.enabled`` and so on) can be False.

    ``memory`` holds changes to the settings that the ``memdlm`` folder was trained with.

    Raises:
        KeyError, TypeError, ValueError: naming the field, see ``_cli.build``.
    """
    settings = without_disabled(config.to_dict())
    _cli.drop_distributed(settings)
    if "task_decode" in settings:
        settings["task_decode"] = any_length(settings["task_decode"])
    _model.resolve(settings, "mdlm", "memdlm", "under")
    changed, folder = settings.get("memory") or {}, settings.get("memdlm") or ""
    settings["memory"] = _memory.settings(folder, changed)
    return _cli.build(EvaluateConfig, settings)


def any_length(sampler: dict[str, Any]) -> dict[str, Any]:
    """A sampler whose length is still to be set, with one that its blocks and steps allow."""
    if "length" in sampler:
        raise KeyError("config.task_decode.length is no setting: each task has its own")
    blocks, steps = sampler.get("block_length") or 1, sampler.get("steps") or 1
    return sampler | {"length": int(blocks) * int(steps)}


def without_disabled(settings: dict[str, Any]) -> dict[str, Any]:
    """Replace the sections that say ``enabled = False`` by ``None``."""
    for name in ("needles", "likelihood", "tasks", "exposure", "retrieval"):
        section = settings.get(name) or {}
        enabled = section.pop("enabled", True)
        if type(enabled) is not bool:
            raise TypeError(f"config.{name}.enabled={enabled!r} must be bool")
        if not enabled:
            settings[name] = None
    return settings


def measure(config: EvaluateConfig) -> dict[str, Any]:
    """Measure all systems; JSON-ready parts of a report, with ``seconds`` by part.

    What was answered or computed before with the same settings and weights, and lies in
    ``config.output``, is read back.

    Raises:
        FileNotFoundError: a model folder or a file of text is not there.
        ImportError: a corpus package is not installed.
        ValueError: systems that do not compare, or text that does not fit.
    """
    loaded = _evaluation.load(config)
    reading = config.likelihood or config.exposure or config.held_out.samples
    if reading and config.held_out.max_length > loaded.max_length:
        raise ValueError(
            f"held_out.max_length={config.held_out.max_length} must be at most "
            f"{loaded.max_length}, the longest canvas (max_length, or what the models are meant "
            "for)"
        )
    answers = Answers(storage.path(config.output) / "answers.jsonl")
    results: dict[str, Any] = {}
    seconds: dict[str, float] = {}

    def part(name: str, compute: Callable[[], dict[str, Any]]) -> None:
        start = time.monotonic()
        results.update(compute())
        seconds[name] = time.monotonic() - start
        if processes.is_first():
            print(f"{name}: {seconds[name]:.1f} s", file=sys.stderr, flush=True)

    def once(name: str, compute: Callable[[EvaluateConfig, Loaded], dict[str, Any]]) -> None:
        work = functools.partial(compute, config, loaded)
        found, seconds[name] = _measures.remembered(config, loaded, name, work)
        results.update(found)

    made = _measures.make_tasks(config, loaded) if config.tasks else ()
    if config.retrieval:
        once("retrieval", _measures.probe_retrieval)
    if suite := config.needles:
        part("needles", lambda: _measures.ask_needles(config, loaded, suite, answers))
    if config.tasks:
        part("tasks", lambda: _measures.ask_tasks(config, loaded, made, answers))
    if reading:
        once("held-out", _measures.read_held_out)
    return results | {"seconds": seconds}


def provenance(module: str, settings: Any) -> dict[str, Any]:
    """What a reader needs to do it again: the ``run`` part of a report, but for ``seconds``."""
    versions = {"python": platform.python_version()}
    versions |= {name: installed_version(name) or "not installed" for name in PACKAGES}
    device = jax.devices()[0]
    versions["device"] = f"{len(jax.devices())} x {device.device_kind}, {os.cpu_count()} CPU cores"
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "config": dataclasses.asdict(settings),
        "versions": versions,
        "notes": [],
    }


def table(results: Mapping[str, Any]) -> str:
    """The numbers for a terminal, one line per cell and system."""
    lines = []
    for cell in results.get("needles", {}).get("cells", ()):
        for name, score in cell["systems"].items():
            accuracy = score["accuracy"]
            lines.append(
                f"needles {cell['length']:>5} tokens {cell['num_keys']:>2} keys n={cell['n']:<5} "
                f"{name:<18} {report.percent(accuracy['value']):>5} %  "
                f"({report.interval(accuracy['interval'])}; "
                f"chance {report.percent(cell['value_of_context_floor'])})"
            )
    for cell in results.get("tasks", {}).get("cells", ()):
        for name, found in cell["systems"].items():
            for kind, score in found.items():
                if kind != "by_depth":
                    floor = cell["floors"].get(kind)
                    lines.append(
                        f"{cell['task']:<16} {cell['length']:>6} tokens seed {cell['seed']:<3} "
                        f"n={cell['n']:<5} "
                        f"{name:<18} {kind:<8} {report.percent(score['mean']):>5} %  "
                        f"({report.interval(score['interval'])}; chance {report.percent(floor)})"
                    )
    for name, value in results.get("likelihood", {}).get("systems", {}).items():
        lines.append(
            f"held-out loss  {name:<18} {value['loss']:.4f} ± {value['standard_error']:.4f} "
            "nats per maskable token"
        )
    return "\n".join([*lines, *(f"* {sentence}" for sentence in report.findings(results))])


def main(config: EvaluateConfig) -> None:
    """Run from the command line."""
    processes.end_at_sigterm()
    run = provenance("experiments.evaluate", config)
    measured = measure(config)
    run["seconds"] = measured.pop("seconds")
    if not processes.is_first():
        return
    results = {"title": "Comparison of fine-tuned denoisers", "run": run} | measured
    page = report.write(config.output, results)
    print(table(results))
    print(f"report: {page}")


if __name__ == "__main__":
    _cli.run(from_config_dict, main, "experiments/configs/evaluate.py")

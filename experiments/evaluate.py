"""Compare fine-tuned models: needle accuracy, held-out loss, replies; as JSON, table and report.

    python -m experiments.evaluate --config=experiments/configs/evaluate.py \
        --config.mdlm=MODEL --config.memdlm=MODEL --config.output=runs/evaluate

``mdlm`` and ``memdlm`` are model folders; the latter is measured with memory off
(``memdlm_train_only``) and with each prompt written into memory (``memdlm``). One may be left out.
"""

import dataclasses
import itertools
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from ml_collections import config_dict

from experiments import _cli, _memory, _model
from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.data import sources
from memdlm_jax.data.prepare import installed_version
from memdlm_jax.data.sft import Row
from memdlm_jax.data.text import Split
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation import likelihood, needles, report
from memdlm_jax.evaluation.likelihood import LikelihoodConfig
from memdlm_jax.evaluation.needles import NeedleSuite
from memdlm_jax.evaluation.samples import sample_replies
from memdlm_jax.evaluation.systems import System
from memdlm_jax.memory.config import MemoryConfig

PACKAGES = ("memdlm_jax", "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "chitchat-dataset")


@dataclasses.dataclass(frozen=True)
class HeldOutConfig:
    """Conversations for the held-out loss and the sampled replies.

    Attributes:
        path: JSON lines as for fine-tuning; empty takes the chitchat corpus.
        split: which lines of ``path``; ``all`` is for a file that nothing was trained on, empty is
            the split of everything else.
        rows: one of each conversation, at most this many.
        max_length: tokens of the longest row.
        samples: conversations to show replies to.
    """

    path: str = ""
    split: Literal["", "train", "validation", "test", "all"] = ""
    rows: int = 200
    max_length: int = 256
    samples: int = 3

    def __post_init__(self):
        if self.split and not self.path:
            raise ValueError(f"split={self.split!r} must be empty without path")
        if self.rows < 2:
            raise ValueError(f"rows={self.rows} must be at least 2")
        if not 0 <= self.samples <= self.rows:
            raise ValueError(f"samples={self.samples} must lie in [0, rows={self.rows}]")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """All settings of a comparison.

    Attributes:
        output: folder of ``results.json`` and ``report.html``.
        memory: how ``memdlm`` writes prompts; from the command line, as in its training.
        decode: sampler of the needle answers.
        reply: sampler of the replies to held-out conversations.
        held_out: those conversations.
        mdlm: model folder trained without memory, or empty.
        memdlm: model folder trained with memory, or empty.
        needles: cells of the needle comparison; ``None`` leaves it out.
        likelihood: held-out loss; ``None`` leaves it out.
        haystack: folder of text for the haystacks; empty takes the chitchat corpus.
        split: held-out split that everything comes from, own conversations aside.
        seed: of memory, sampling noise and the choice of conversations.
        max_length: longest canvas in tokens; 0 is what the model is meant for.
        batch_size: rows decoded at a time.
        dtype: of the activations, and of the parameters unless ``base`` says otherwise.
        base: how parameters are held; ``int8`` and ``nf4`` hold the layers' matrices as codes.
        under: model folder under folders that hold adapters; empty is the one that they name.
    """

    output: str
    memory: MemoryConfig
    decode: DecodeConfig
    reply: DecodeConfig
    held_out: HeldOutConfig
    mdlm: str = ""
    memdlm: str = ""
    needles: NeedleSuite | None = None
    likelihood: LikelihoodConfig | None = None
    haystack: str = ""
    split: Split = "test"
    seed: int = 0
    max_length: int = 0
    batch_size: int = 8
    dtype: _model.Dtype = "float32"
    base: _model.Base | None = None
    under: str = ""

    def __post_init__(self):
        if not self.output:
            raise ValueError("output='' must name a folder")
        for name, least in (("seed", 0), ("max_length", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.needles and self.needles.task.split != self.split:
            raise ValueError(
                f"needles.task.split={self.needles.task.split!r} must be split={self.split!r}"
            )


def from_config_dict(config: config_dict.ConfigDict) -> EvaluateConfig:
    """Build the settings; ``needles.enabled`` and ``likelihood.enabled`` can be False.

    ``memory`` holds changes to the settings that the ``memdlm`` folder was trained with.

    Raises:
        KeyError, TypeError, ValueError: naming the field, see ``_cli.build``.
    """
    settings = without_disabled(config.to_dict())
    _model.resolve(settings, "mdlm", "memdlm", "under")
    changed, folder = settings.get("memory") or {}, settings.get("memdlm") or ""
    settings["memory"] = _memory.settings(folder, changed)
    return _cli.build(EvaluateConfig, settings)


def without_disabled(settings: dict[str, Any]) -> dict[str, Any]:
    """Replace the sections that say ``enabled = False`` by ``None``."""
    for name in ("needles", "likelihood"):
        section = settings.get(name) or {}
        enabled = section.pop("enabled", True)
        if type(enabled) is not bool:
            raise TypeError(f"config.{name}.enabled={enabled!r} must be bool")
        if not enabled:
            settings[name] = None
    return settings


def measure(config: EvaluateConfig) -> dict[str, Any]:
    """Measure all systems; JSON-ready parts of a report, with ``seconds`` by part.

    Raises:
        FileNotFoundError: a model folder or a file of text is not there.
        ImportError: a corpus package is not installed.
        ValueError: systems that do not compare, or text that does not fit.
    """
    systems, tokenizer, max_length = load_systems(config)
    reading = config.likelihood or config.held_out.samples
    if reading and config.held_out.max_length > max_length:
        raise ValueError(
            f"held_out.max_length={config.held_out.max_length} must be at most {max_length}, the "
            "longest canvas (max_length, or what the models are meant for)"
        )
    results: dict[str, Any] = {}
    seconds: dict[str, float] = {}

    def part(name: str, compute: Callable[[], dict[str, Any]]) -> None:
        start = time.monotonic()
        results.update(compute())
        seconds[name] = time.monotonic() - start
        print(f"{name}: {seconds[name]:.1f} s", file=sys.stderr, flush=True)

    if config.needles:
        suite = config.needles
        part("needles", lambda: ask_needles(config, suite, systems, tokenizer, max_length))
    if reading:
        part("held-out", lambda: read_held_out(config, systems, tokenizer, max_length))
    return results | {"seconds": seconds}


def load_systems(config: EvaluateConfig) -> tuple[list[System], Tokenizer, int]:
    """The systems of the given folders, their tokenizer, and the longest canvas.

    Raises:
        ValueError: no folder is given, or two of them disagree on sizes or tokenizer.
    """
    systems: list[System] = []
    tokenizers, models = {}, []
    for name, folder in (("mdlm", config.mdlm), ("memdlm", config.memdlm)):
        if not folder:
            continue
        under = config.under if hugging_face.is_adapter(folder) else ""
        denoiser, theta, tokenizer = _model.load(folder, config.dtype, config.base, under)
        tokenizers[tokenizer.digest()] = tokenizer
        models.append(denoiser.config)
        if name == "mdlm":
            systems.append(System("mdlm", denoiser, theta))
        else:
            systems.append(System("memdlm_train_only", denoiser, theta))
            inner = _memory.inner_parameters(folder, denoiser, config.memory)
            systems.append(System("memdlm", denoiser, theta, config.memory, inner))
    if config.under and not any(map(hugging_face.is_adapter, (config.mdlm, config.memdlm))):
        raise ValueError(f"under={config.under!r} must be empty: no folder holds an adapter")
    if not systems:
        raise ValueError("mdlm='' and memdlm='': at least one must name a model folder")
    if len(tokenizers) > 1:
        raise ValueError(
            f"mdlm={config.mdlm} and memdlm={config.memdlm} differ in their tokenizers"
        )
    first, last = (dataclasses.asdict(model) for model in (models[0], models[-1]))
    if differ := [f"{k}={first[k]!r} and {last[k]!r}" for k in first if first[k] != last[k]]:
        raise ValueError(
            f"mdlm={config.mdlm} and memdlm={config.memdlm} must be models of one kind, they have "
            + ", ".join(differ)
        )
    return systems, next(iter(tokenizers.values())), config.max_length or models[0].max_length


def ask_needles(
    config: EvaluateConfig,
    suite: NeedleSuite,
    systems: list[System],
    tokenizer: Tokenizer,
    max_length: int,
) -> dict[str, Any]:
    """Needle accuracy of every system.

    Raises:
        ValueError: before anything is asked, if an answer is longer than ``decode.length``.
    """
    answerers = {
        system.name: needles.answerer(
            system, tokenizer, config.decode,
            seed=config.seed, max_length=max_length, batch_size=config.batch_size,
        )
        for system in systems
    }  # fmt: skip
    if config.haystack:
        filler = sources.text_sentences(config.haystack, config.split)
    else:
        filler = sources.chitchat_sentences(config.split)
    window = config.decode.length
    return {"needles": needles.evaluate(suite, tokenizer, filler, answerers, window)}


def read_held_out(
    config: EvaluateConfig, systems: list[System], tokenizer: Tokenizer, max_length: int
) -> dict[str, Any]:
    """Held-out loss of every system, and some replies."""
    held = config.held_out
    rows = held_out_rows(config, tokenizer)
    results: dict[str, Any] = {}
    if config.likelihood:
        results["likelihood"] = likelihood.evaluate(
            systems, rows, config.likelihood,
            pad_token_id=tokenizer.pad_id, batch_size=config.batch_size,
        )  # fmt: skip
    room = max_length - config.reply.length
    short = [row for row in rows if 0 < row.prompt_length <= room]
    if chosen := list(itertools.islice(short, held.samples)):
        results["samples"], results["history"] = sample_replies(
            systems, tokenizer, chosen, config.reply, seed=config.seed, max_length=max_length
        )
    return results


def held_out_rows(config: EvaluateConfig, tokenizer: Tokenizer) -> list[Row]:
    """One row of each held-out conversation; says how many of how many were taken.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the corpus package is not installed.
        ValueError: a wrong line, or fewer than two rows; names the split.
    """
    held, split = config.held_out, config.held_out.split or config.split
    if held.path:
        total = sum(1 for _ in sources.jsonl_examples(held.path, None))
        examples = list(sources.jsonl_examples(held.path, None if split == "all" else split))
        taken = f"{len(examples)} of {total} examples of {held.path}"
    else:
        examples = list(sources.chitchat_examples(config.split))
        taken = f"{len(examples)} examples of the chitchat corpus"
    groups = len({example.group for example in examples})
    try:
        rows = likelihood.held_out_rows(
            examples, tokenizer, max_length=held.max_length, count=held.rows, seed=config.seed
        )
    except ValueError as error:
        raise ValueError(
            f"the split {split!r} has {taken}, in {groups} groups: {error}. Give "
            "more groups, or set held_out.split='all' for a file that is all held out"
        ) from error
    print(
        f"held-out: {len(rows)} rows, one a group, of {groups} groups ({taken}, split {split!r})",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    return rows


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
    for name, value in results.get("likelihood", {}).get("systems", {}).items():
        lines.append(
            f"held-out loss  {name:<18} {value['loss']:.4f} ± {value['standard_error']:.4f} "
            "nats per maskable token"
        )
    return "\n".join([*lines, *(f"* {sentence}" for sentence in report.findings(results))])


def main(config: EvaluateConfig) -> None:
    """Run from the command line."""
    run = provenance("experiments.evaluate", config)
    measured = measure(config)
    run["seconds"] = measured.pop("seconds")
    results = {"title": "Comparison of fine-tuned denoisers", "run": run} | measured
    page = report.write(config.output, results)
    print(table(results))
    print(f"report: {page}")


if __name__ == "__main__":
    _cli.run(from_config_dict, main, "experiments/configs/evaluate.py")

"""Answer prompts with a model folder; one JSON object per prompt and line.

    python -m experiments.generate --config=experiments/configs/generate.py \
        --config.model=MODEL --config.prompt="How are you?"
    python -m experiments.generate --config.model=MODEL --config.input=prompts.txt
    cat prompts.txt | python -m experiments.generate --config.model=MODEL --config.input=-

An input has one prompt per line; a file whose name ends in .jsonl has one object per line, with
the prompt under ``prompt``. ``--config.memory.enabled=True`` writes each prompt into memory first.
With ``--config.context=FILE`` that text is written instead, once for all prompts. Several processes
(``--config.distributed``) share the prompts out; the first writes all answers, in order.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import config_dict

from experiments import _cli, _memory, _model
from memdlm_jax import processes, storage
from memdlm_jax.data.example import Example
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion.decode import Decoded
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation.samples import denoising_history
from memdlm_jax.evaluation.systems import (
    System,
    batches,
    prompt_ids,
    replies,
    stopping,
    write_context,
)
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import inner_loop_for
from memdlm_jax.progress import Progress
from memdlm_jax.typing import Phi


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """All settings of a run.

    Attributes:
        model: model folder: config.json or a PEFT adapter, safetensors, tokenizer.
        decode: the sampler.
        memory: how prompts are written into memory, ``None`` for none.
        prompt: one prompt; or
        input: a file of prompts, ``-`` for standard input.
        context: a text file that all prompts are about. With memory it is written once, and the
            prompts are not; so it may be longer than the model reads if ``memory.prompt_chunk`` is
            set.
        show_context: whether the context stands before each prompt; if not, it is in memory alone.
        save_memory: file for the memory of the context.
        load_memory: file of a memory that was saved; it is read in the place of writing one.
        output: file of the answers; empty is standard output.
        history: also give commit step and confidence of every token.
        seed: of memory and sampling noise.
        max_length: longest canvas in tokens; 0 is what the model is meant for.
        batch_size: rows decoded at a time.
        dtype: of the activations, and of the parameters unless ``base`` says otherwise.
        base: how parameters are held; ``int8`` and ``nf4`` hold the layers' matrices as codes.
        under: model folder under one that holds an adapter; empty is the one that it names.
    """

    model: str
    decode: DecodeConfig
    memory: MemoryConfig | None = None
    prompt: str = ""
    input: str = ""
    context: str = ""
    show_context: bool = True
    save_memory: str = ""
    load_memory: str = ""
    output: str = ""
    history: bool = False
    seed: int = 0
    max_length: int = 0
    batch_size: int = 8
    dtype: _model.Dtype = "float32"
    base: _model.Base | None = None
    under: str = ""

    def __post_init__(self):
        if not self.model:
            raise ValueError("model='' must name a model folder")
        if self.prompt and not self.prompt.strip():
            raise ValueError(f"prompt={self.prompt!r} must have some text")
        if bool(self.prompt) == bool(self.input):
            raise ValueError(
                f"prompt={self.prompt!r} and input={self.input!r}: exactly one must be given"
            )
        for name, least in (("seed", 0), ("max_length", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.save_memory and not (self.context and self.memory and not self.load_memory):
            raise ValueError(
                f"save_memory={self.save_memory!r} needs a context, memory.enabled=True and no "
                "load_memory: there is no one memory to save otherwise"
            )
        if not (self.show_context or (self.context and self.memory)):
            raise ValueError(
                "show_context=False needs a context and memory.enabled=True: the model would not "
                "know it"
            )


def from_config_dict(config: config_dict.ConfigDict) -> GenerateConfig:
    """Build the settings; unless ``memory.enabled``, the rest of ``memory`` is dropped.

    ``enabled = None`` is on only with ``load_memory``. The rest holds changes to the settings that
    the model was trained with.

    Raises:
        KeyError, TypeError, ValueError: naming the field, see ``_cli.build``.
    """
    settings = config.to_dict()
    _cli.drop_distributed(settings)
    _model.resolve(settings, "model", "under")
    enabled = settings["memory"].pop("enabled", None)
    if type(enabled) not in (bool, type(None)):
        raise TypeError(f"config.memory.enabled={enabled!r} must be bool")
    saved = settings.get("load_memory", "")
    if saved and enabled is False:
        raise ValueError(f"load_memory={saved!r} with memory.enabled=False: one of them must go")
    if saved:
        changed = {name: x for name, x in settings["memory"].items() if x is not None}
        now = {"adapt_every": changed.pop("adapt_every", 0)}
        if changed:
            raise ValueError(f"load_memory={saved!r} brings its own settings, not {changed}")
        settings["memory"] = dataclasses.replace(_memory.written_settings(saved), **now)
        return _cli.build(GenerateConfig, settings)
    folder = settings["model"] if enabled else ""
    memory = _memory.settings(folder, settings["memory"])  # a typo is an error in any case
    settings["memory"] = memory if enabled else None
    return _cli.build(GenerateConfig, settings)


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts, in order.

    Raises:
        FileNotFoundError: no such input file.
        ValueError: there is no prompt, or one is empty or malformed; names the line.
    """
    if config.prompt:
        return [config.prompt]
    if config.input == "-":
        text, name = sys.stdin.read(), "standard input"
    else:
        text, name = _read(config.input), config.input
    lines = text.split("\n")  # Nothing else ends a line, of JSON least of all.
    lines = [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
    read = _from_json if name.endswith(".jsonl") else str
    prompts = []
    for number, line in enumerate(lines, start=1):
        prompt = read(line)
        if not prompt or not prompt.strip():
            raise ValueError(f"{name}:{number}: the prompt is empty or missing, or no JSON object")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{name} has no prompt; it must have one per line")
    return prompts


def _read(file: str) -> str:
    """A text file, with or without a byte order mark.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no UTF-8.
    """
    try:
        return storage.read_text(storage.path(file), "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text: {error}") from error


def _from_json(line: str) -> str:
    """The prompt of a JSON line; empty if it has none."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError:
        return ""
    prompt = fields.get("prompt") if isinstance(fields, dict) else None
    return prompt if isinstance(prompt, str) else ""


def answers(config: GenerateConfig, prompts: list[str]) -> Iterator[dict[str, Any]]:
    """One JSON-ready object per prompt, batch by batch; several processes share the batches out.

    Raises:
        FileNotFoundError: no such context.
        ValueError: a prompt does not fit, or the context is empty.
    """
    denoiser, theta, tokenizer = _model.load(config.model, config.dtype, config.base, config.under)
    name, learned = "mdlm", None
    if config.memory:
        name, learned = "memdlm", _memory.inner_parameters(config.model, denoiser, config.memory)
    system = System(name, denoiser, theta, inner_loop_for(denoiser, config.memory), learned)
    max_length = config.max_length or denoiser.config.max_length
    context = read_context(config)
    phi = memory_of(config, system, tokenizer, context, max_length)
    shown = f"{context}\n\n" if context and config.show_context else ""
    # A prompt may be longer than the canvas if it is written in pieces.
    longest = sys.maxsize if config.memory and config.memory.prompt_chunk else max_length
    examples = [Example(shown + p, "?", f"line {i}", "input") for i, p in enumerate(prompts, 1)]
    ids = [prompt_ids(tokenizer, example, longest) for example in examples]
    settings = stopping(config.decode, tokenizer)
    size = config.batch_size
    shares = [range(len(prompts))[start : start + size] for start in range(0, len(prompts), size)]
    mine = [i for share in shares[jax.process_index() :: jax.process_count()] for i in share]
    decoded = batches(
        system, [ids[i] for i in mine], settings, seed=config.seed, pad_token_id=tokenizer.pad_id,
        max_length=max_length, batch_size=size, phi=phi, record=config.history, numbers=mine,
        width=max(map(len, ids)),
    )  # fmt: skip

    def answered(share: range) -> list[dict[str, Any]]:
        return described(config, tokenizer, [prompts[i] for i in share], next(decoded))

    for some in processes.shared_out(shares, answered):
        yield from some


def described(
    config: GenerateConfig, tokenizer: Tokenizer, prompts: list[str], decoded: Decoded
) -> list[dict[str, Any]]:
    """What is said of the answers of one batch."""
    said = replies(tokenizer, decoded, stopping(config.decode, tokenizer).stop)
    answers = []
    for row, (prompt, text) in enumerate(zip(prompts, said.texts, strict=True)):
        answer = {
            "prompt": prompt,
            "reply": text,
            "tokens": int(said.lengths[row]),
            "ended": bool(said.lengths[row] < config.decode.length),
            "steps": int(decoded.steps[row]),
            "memory": config.memory is not None,
        }
        if config.history:
            answer["history"] = denoising_history(decoded, row, tokenizer)
        answers.append(answer)
    return answers


def read_context(config: GenerateConfig) -> str:
    """The text that all prompts are about; empty if there is none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is empty.
    """
    if not config.context:
        return ""
    text = _read(config.context).strip()
    if not text:
        raise ValueError(f"context={config.context!r} is empty")
    return text


def memory_of(
    config: GenerateConfig, system: System, tokenizer: Tokenizer, context: str, max_length: int
) -> Phi:
    """The one memory of all prompts, read or written; ``None`` if each has its own or none.

    Raises:
        FileNotFoundError, ValueError: see ``_memory.load_written``; or the context is longer than
            the model reads and is not to be written in pieces.
    """
    if system.memory is None:
        return None
    where = config.model, config.under
    if config.load_memory:
        return _memory.load_written(config.load_memory, system.denoiser, system.memory, *where)
    if not context:
        return None
    pieces = system.memory.prompt_chunk
    example = Example(context, "?", "the context", "input")
    ids = prompt_ids(tokenizer, example, sys.maxsize)
    if pieces > max_length:
        raise ValueError(f"memory.prompt_chunk={pieces} must be at most max_length={max_length}")
    if not pieces and len(ids) > max_length:
        raise ValueError(
            f"context={config.context!r} has {len(ids)} tokens, more than max_length={max_length}: "
            "set memory.prompt_chunk to write it in pieces"
        )
    phi, record = write_context(system, ids, config.seed, tokenizer.pad_id)
    losses = ", ".join(f"{loss:.3f}" for loss in record.loss.ravel())
    if processes.is_first():
        print(f"wrote {len(ids)} tokens into memory, inner losses {losses}", file=sys.stderr)
    if config.save_memory and processes.is_first():
        _memory.save_written(config.save_memory, phi, system.memory, *where)
    return phi


def main(config: GenerateConfig) -> None:
    """Run from the command line; lines are written as they come, by the first process."""
    processes.end_at_sigterm()
    # The others may have no standard input.
    prompts = processes.gather(read_prompts(config) if processes.is_first() else [])[0]
    found = answers(config, prompts)
    if not processes.is_first():
        collections.deque(found, maxlen=0)
        return
    for file in filter(None, (config.output, config.save_memory)):
        storage.path(file).parent.mkdir(parents=True, exist_ok=True)
    # Answers on a terminal show themselves how far it is.
    quiet = not config.output and sys.stdout.isatty()
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(Progress("answers", len(prompts), "prompt", quiet=quiet))
        # What cannot be answered must not have emptied the file of the answers.
        first = next(found)
        out = sys.stdout
        if config.output:
            out = stack.enter_context(storage.path(config.output).open("w", encoding="utf-8"))
        for answer in itertools.chain([first], found):
            print(json.dumps(answer, ensure_ascii=False), file=out, flush=True)
            bar.update()


if __name__ == "__main__":
    _cli.run(from_config_dict, main, "experiments/configs/generate.py")

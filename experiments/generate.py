"""Answer prompts with a model folder; one JSON object per prompt and line.

    python -m experiments.generate --config=experiments/configs/generate.py \
        --config.model=MODEL --config.prompt="How are you?"
    python -m experiments.generate --config.model=MODEL --config.input=prompts.txt
    cat prompts.txt | python -m experiments.generate --config.model=MODEL --config.input=-

An input has one prompt per line; a file whose name ends in .jsonl has one object per line, with
the prompt under ``prompt``. ``--config.memory.enabled=True`` writes each prompt into memory first.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from experiments import _cli, _memory, _model
from memdlm_jax.data.example import Example
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation.samples import denoising_history
from memdlm_jax.evaluation.systems import System, prompt_ids, reply
from memdlm_jax.memory.config import MemoryConfig


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """All settings of a run.

    Attributes:
        model: model folder: config.json or a PEFT adapter, safetensors, tokenizer.
        decode: the sampler.
        memory: how prompts are written into memory, ``None`` for none.
        prompt: one prompt; or
        input: a file of prompts, ``-`` for standard input.
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
        if bool(self.prompt) == bool(self.input):
            raise ValueError(
                f"prompt={self.prompt!r} and input={self.input!r}: exactly one must be given"
            )
        for name, least in (("seed", 0), ("max_length", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


def from_config_dict(config: config_dict.ConfigDict) -> GenerateConfig:
    """Build the settings; ``memory.enabled = False`` drops the rest of ``memory``.

    The rest holds changes to the settings that the model was trained with.

    Raises:
        KeyError, TypeError, ValueError: naming the field, see ``_cli.build``.
    """
    settings = config.to_dict()
    _model.resolve(settings, "model", "under")
    enabled = settings["memory"].pop("enabled", True)
    if type(enabled) is not bool:
        raise TypeError(f"config.memory.enabled={enabled!r} must be bool")
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
        lines, name = sys.stdin.read().splitlines(), "standard input"
    else:
        lines, name = Path(config.input).read_text(encoding="utf-8").splitlines(), config.input
    read = _from_json if name.endswith(".jsonl") else str
    prompts = []
    for number, line in enumerate(lines, start=1):
        prompt = read(line)
        if not prompt or not prompt.strip():
            raise ValueError(f"{name}:{number}: the prompt is empty or missing")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{name} has no prompt; it must have one per line")
    return prompts


def _from_json(line: str) -> str:
    """The prompt of a JSON line; empty if it has none."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError:
        return ""
    prompt = fields.get("prompt") if isinstance(fields, dict) else None
    return prompt if isinstance(prompt, str) else ""


def answers(config: GenerateConfig, prompts: list[str]) -> Iterator[dict[str, Any]]:
    """One JSON-ready object per prompt."""
    denoiser, theta, tokenizer = _model.load(config.model, config.dtype, config.base, config.under)
    name, inner = "mdlm", None
    if config.memory:
        name, inner = "memdlm", _memory.inner_parameters(config.model, denoiser, config.memory)
    system = System(name, denoiser, theta, config.memory, inner)
    max_length = config.max_length or denoiser.config.max_length
    examples = [Example(p, "?", f"line {i}", "input") for i, p in enumerate(prompts, start=1)]
    replies = reply(
        system, tokenizer, [prompt_ids(tokenizer, e, max_length) for e in examples], config.decode,
        seed=config.seed, max_length=max_length, batch_size=config.batch_size,
    )  # fmt: skip
    for i, (prompt, text) in enumerate(zip(prompts, replies.texts, strict=True)):
        answer = {
            "prompt": prompt,
            "reply": text,
            "tokens": int(replies.lengths[i]),
            "ended": bool(replies.lengths[i] < config.decode.length),
            "memory": config.memory is not None,
        }
        if config.history:
            answer["history"] = denoising_history(replies.decoded, i, tokenizer)
        yield answer


def main(config: GenerateConfig) -> None:
    """Run from the command line."""
    lines = [json.dumps(a, ensure_ascii=False) for a in answers(config, read_prompts(config))]
    text = "\n".join(lines) + "\n"
    if config.output:
        Path(config.output).write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    _cli.run(from_config_dict, main, "experiments/configs/generate.py")

"""Read a document into memory, then answer questions without it.

    python -m experiments.ask --model=MODEL --document=FILE --question="..." [--question="..."]
    python -m experiments.ask --model=MODEL --document=FILE --save_memory=notes.safetensors
    python -m experiments.ask --model=MODEL --load_memory=notes.safetensors --question="..."

The document is written into fast weights once, as the model was trained to write. The model then
sees the questions alone. Each answer is shown beside the answer without memory; ``--json`` prints
one object a question. A memory can be read by the very weights that wrote it, and by no others.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence

import jax

from experiments import _memory, _model
from memdlm_jax import storage
from memdlm_jax.data.episodes import encode_text
from memdlm_jax.data.example import Example
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation.systems import System, prompt_ids, reply
from memdlm_jax.memory import written
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.typing import Phi


@dataclasses.dataclass(frozen=True)
class Answer:
    """A question with both answers.

    Attributes:
        question: as it was asked.
        answer: with the document in memory.
        answer_without_memory: of the same weights without memory.
    """

    question: str
    answer: str
    answer_without_memory: str


def load(model: str, load_memory: str = "") -> tuple[System, MemoryConfig, Tokenizer, int]:
    """A model folder that can write, how it does, its tokenizer, and the longest canvas in tokens.

    Raises:
        FileNotFoundError, ValueError: see ``_model.load``; or the folder was not trained to write
            texts in segments.
    """
    denoiser, theta, tokenizer = _model.load(model, "float32")
    saved = _memory.written_settings(load_memory) if load_memory else None
    memory = saved or _memory.settings(model, {})
    if not memory.prompt_chunk:
        raise ValueError(
            f"model={model!r} was not trained to answer from memory: its memory.prompt_chunk is 0. "
            "Train one with experiments.written_memory"
        )
    # What was written before is only read: the model need not be able to write.
    learned = None if saved else _memory.inner_parameters(model, denoiser, memory)
    system = System("memdlm", denoiser, theta, InnerLoop(denoiser, memory), learned)
    return system, memory, tokenizer, denoiser.config.max_length


def read(system: System, tokenizer: Tokenizer, text: str, seed: int) -> tuple[Phi, int]:
    """Write a text into memory: (phi of one group, tokens written).

    Raises:
        ValueError: the text is empty, or the system cannot write.
    """
    loop = system.inner_loop
    if loop is None:
        raise ValueError(f"{system.name} has no inner loop: it cannot write texts")
    texts = encode_text(tokenizer, text, loop.config.prompt_chunk)

    def write(key, theta, texts, learned):
        return written.write_texts(key, loop, theta, texts, learned)[0]

    phi = jax.jit(write)(jax.random.key(seed), system.theta, texts, system.learned)
    return phi, int(texts.valid.sum())


def answers(
    system: System,
    tokenizer: Tokenizer,
    phi: Phi,
    questions: Sequence[str],
    decode: DecodeConfig,
    max_length: int,
    seed: int = 0,
) -> Iterator[Answer]:
    """Answer each question with the memory, and without."""
    room = max_length - decode.length
    examples = [Example(q, "?", f"question {i}", "ask") for i, q in enumerate(questions, 1)]
    prompts = [prompt_ids(tokenizer, example, room) for example in examples]
    settings = {"seed": seed, "max_length": max_length}
    on = reply(system, tokenizer, prompts, decode, phi=phi, **settings)
    off = reply(system.with_memory(None), tokenizer, prompts, decode, **settings)
    for question, with_memory, without in zip(questions, on.texts, off.texts, strict=True):
        yield Answer(question, with_memory.strip(), without.strip())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ask",
        description="Read a document into memory, then answer questions without it.",
    )
    parser.add_argument("--model", required=True, help="model folder trained to write texts")
    parser.add_argument("--document", default="", help="UTF-8 text file to read")
    parser.add_argument("--question", action="append", default=[], help="may be repeated")
    parser.add_argument("--save_memory", default="", help="file to keep the memory in")
    parser.add_argument("--load_memory", default="", help="file of a memory, instead of a document")
    parser.add_argument(
        "--length", type=int, default=3,
        help="most tokens of an answer with its end, as the model was trained (shipped reader: 3)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the masks of the writing")
    parser.add_argument("--json", action="store_true", help="one JSON object a question")
    o = parser.parse_args(arguments)
    if bool(o.document) == bool(o.load_memory):
        parser.error("exactly one of --document and --load_memory must be given")
    if not (o.question or o.save_memory):
        parser.error("--question or --save_memory must be given: there is nothing to do")
    if any(not question.strip() for question in o.question):
        parser.error("--question='' must have some text")
    if o.save_memory and o.load_memory:
        parser.error("--save_memory needs --document: a loaded memory is saved already")
    try:
        decode = DecodeConfig(length=o.length, block_length=1)  # from left to right
        text = storage.read_text(storage.path(o.document), "utf-8-sig") if o.document else ""
        system, memory, tokenizer, max_length = load(o.model, o.load_memory)
        if o.load_memory:
            phi = _memory.load_written(o.load_memory, system.denoiser, memory, o.model)
        else:
            phi, count = read(system, tokenizer, text, o.seed)
            print(f"wrote {count} tokens of {o.document} into memory", file=sys.stderr)
        if o.save_memory:
            _memory.save_written(o.save_memory, phi, memory, o.model)
        for answer in answers(system, tokenizer, phi, o.question, decode, max_length, o.seed):
            if o.json:
                print(json.dumps(dataclasses.asdict(answer), ensure_ascii=False), flush=True)
            else:
                print(f"Q: {answer.question}\nA: {answer.answer}")
                print(f"   (without memory: {answer.answer_without_memory})", flush=True)
    except UnicodeDecodeError as error:
        sys.exit(f"error: {o.document} is not UTF-8 text: {error}")
    except (OSError, ImportError, KeyError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

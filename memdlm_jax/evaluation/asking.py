"""Ask systems the questions of cells; what was answered before is read back, not asked again.

Several processes share out the questions and tell each other the answers.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from memdlm_jax import processes, storage
from memdlm_jax.data.example import Example
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation import systems as system_replies
from memdlm_jax.evaluation.systems import System, prompt_ids

Report = Callable[[int], None]
"""Is told how many questions more have been answered."""


class Answers:
    """Replies in files of JSON lines, each with a key: the digest of all that it depends on.

    Process 0, or the only one, writes NAME.jsonl, process p NAME-p.jsonl; all are read, however
    many processes there were. A line that a killed program left unfinished is taken off the end of
    a file, or passed over in that of another process.

    Attributes:
        path: the file of this process; ``None`` keeps nothing.
    """

    def __init__(self, path: str | Path | None):
        """Read what is there; returns when all processes have read the same.

        Args:
            path: the file of process 0.

        Raises:
            ValueError: a line is not one of ours, naming it; or the processes do not see the same
                files.
        """
        self.path = None
        self._own = ""
        self._found: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        first = storage.path(path)
        own = f"-{jax.process_index()}" if processes.several() and not processes.is_first() else ""
        self.path = first.with_stem(first.stem + own)
        for file in (first, *sorted(first.parent.glob(f"{first.stem}-*{first.suffix}"))):
            if file.exists():
                self._read(file)
        # Nothing is written before everything is read.
        known = processes.gather(hashlib.sha256(repr(sorted(self._found)).encode()).hexdigest())
        if len(set(known)) > 1:
            raise ValueError(
                f"the processes read different answers in {first.parent}: it must be a folder that "
                "all of them see"
            )

    def _read(self, file: Path) -> None:
        data = file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
            try:
                record = json.loads(line)
                self._found[record["key"]] = record | {"reply": record["reply"]}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file}:{number} is no answer that was written here: {error!r}; remove "
                    "the file, or give another output"
                ) from error
        if file == self.path:
            self._own = whole.decode("utf-8") if storage.is_remote(file) else ""
            if len(whole) < len(data):
                file.write_bytes(whole)

    def __contains__(self, key: str) -> bool:
        """Whether there is a record of this key."""
        return key in self._found

    def __getitem__(self, key: str) -> dict[str, Any]:
        """The record of this key, the newest if there are several."""
        return self._found[key]

    def add(self, records: Sequence[Mapping[str, Any]], write: bool = True) -> None:
        """Append records, each with its ``key``; those that another process wrote are only kept."""
        lines = [json.dumps(dict(record), allow_nan=False) for record in records]
        # As they will be read back.
        self._found.update({record["key"]: record for record in map(json.loads, lines)})
        if write and self.path is not None:
            self._append("".join(line + "\n" for line in lines))

    def _append(self, text: str) -> None:
        """Add whole lines to the file of this process; in a bucket it is written anew."""
        assert self.path is not None
        if storage.is_remote(self.path):
            self._own += text
            self.path.write_text(self._own, encoding="utf-8")
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)


@dataclasses.dataclass(frozen=True)
class Asked:
    """How questions are put.

    Attributes:
        tokenizer: encodes prompts and decodes replies.
        config: sampler; its ``length`` is the tokens of an answer.
        max_length: longest canvas in tokens.
        batch_size: rows decoded at a time.
        seed: of memory and sampling noise.
        weights: system -> digest of its weights and of how they are held.
    """

    tokenizer: Tokenizer
    config: DecodeConfig
    max_length: int
    batch_size: int
    seed: int
    weights: Mapping[str, str]

    def keys(
        self, system: System, cell: Mapping[str, Any], prompts: Sequence[Sequence[int]]
    ) -> list[str]:
        """For each prompt the digest of all that a system's reply to it depends on."""
        facts = {
            "cell": dict(cell),
            "system": system.name,
            "weights": self.weights[system.name],
            "memory": None if system.memory is None else dataclasses.asdict(system.memory),
            "decode": dataclasses.asdict(self.config),
            "tokenizer": self.tokenizer.digest(),
            "max_length": self.max_length,
            "seed": self.seed,
        }
        common = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        found = []
        for number, prompt in enumerate(prompts):
            own = common.copy()
            own.update(json.dumps([number, list(prompt)]).encode())
            found.append(own.hexdigest()[:16])
        return found


def ask(
    asked: Asked,
    system: System,
    cell: Mapping[str, Any],
    examples: Sequence[Example],
    score: Callable[[int, str], Mapping[str, Any]],
    answers: Answers,
    report: Report = lambda done: None,
    width: int = 0,
) -> list[dict[str, Any]]:
    """The records of all questions, in order; those of ``answers`` are not asked again.

    A reply depends on its question and its number alone: batches that were cut off and taken up
    again say what they would have said, and so do processes that share the questions out: each
    answers every n-th and gets the others' answers, so that all return the same. Scores are taken
    anew from replies that were read back.

    Args:
        asked: how.
        system: who.
        cell: what the records say of where the question is from; part of the key.
        examples: the questions.
        score: (number, reply) -> what the record says of the reply.
        answers: earlier ones; new ones are added batch by batch.
        report: told of every batch, and of what was there.
        width: columns of the prompts; 0 takes those of the longest.

    Returns:
        A record of each: ``index``, ``prompt`` (chat template spelled out), ``reply``, ``tokens``
        and ``steps`` of it, ``system`` and ``weights``, with the fields of ``cell`` and of its
        score.

    Raises:
        ValueError: a prompt does not fit, with its number.
    """
    tokenizer, prompts = asked.tokenizer, []
    # Written in pieces, a prompt may be longer than the canvas; ``batches`` then shows its end.
    in_pieces = system.memory is not None and system.memory.prompt_chunk > 0
    limit = sys.maxsize if in_pieces else asked.max_length
    for number, example in enumerate(examples):
        try:
            prompts.append(prompt_ids(tokenizer, example, limit))
        except ValueError as error:
            raise ValueError(f"question {number} of {dict(cell)}: {error}") from error
    keys = asked.keys(system, cell, prompts)
    missing = [i for i, key in enumerate(keys) if key not in answers]
    report(len(examples) - len(missing))
    # The same on all processes, which have read the same answers.
    if missing:
        mine, said = missing[jax.process_index() :: jax.process_count()], []
        common = {"system": system.name, "weights": asked.weights[system.name]} | dict(cell)
        batches = _answered(asked, system, prompts, mine, width or max(map(len, prompts)))
        for batch in batches if mine else ():
            records = [
                {"key": keys[i]} | common | own | dict(score(i, own["reply"])) for i, own in batch
            ]
            answers.add(records)
            report(len(records))
            said += records
        for number, others in enumerate(processes.gather(said)):
            if number != jax.process_index():
                answers.add(others, write=False)
                report(len(others))
    found = [answers[key] for key in keys]
    return [record | dict(score(i, record["reply"])) for i, record in enumerate(found)]


def _answered(
    asked: Asked,
    system: System,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    width: int,
) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Batches of (number, what the record says of the answer to that prompt)."""
    tokenizer, config = asked.tokenizer, system_replies.stopping(asked.config, asked.tokenizer)
    batches = system_replies.batches(
        system, [prompts[i] for i in numbers], config,
        seed=asked.seed, pad_token_id=tokenizer.pad_id, max_length=asked.max_length,
        batch_size=asked.batch_size, numbers=numbers, width=width,
    )  # fmt: skip
    at = 0
    for decoded in batches:
        replies = system_replies.replies(tokenizer, decoded, config.stop)
        rows = numbers[at : at + len(replies.texts)]
        at += len(rows)
        columns = zip(rows, replies.texts, replies.lengths, np.asarray(decoded.steps), strict=True)
        yield [
            (
                i,
                {
                    "index": i,
                    "prompt": tokenizer.decode(prompts[i], skip_special=False),
                    "reply": text,
                    "tokens": int(length),
                    "steps": int(steps),
                },
            )
            for i, text, length, steps in columns
        ]

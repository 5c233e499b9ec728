"""Ask systems the questions of cells; what was answered before is read back, not asked again."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memdlm_jax.data.example import Example
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation import systems as system_replies
from memdlm_jax.evaluation.systems import System, prompt_ids

Report = Callable[[int], None]
"""Is told how many questions more have been answered."""


class Answers:
    """Replies in a file of JSON lines, each with a key: the digest of all that it depends on.

    A line that a killed program left unfinished is taken off the end of the file.

    Attributes:
        path: the file; ``None`` keeps nothing.
    """

    def __init__(self, path: str | Path | None):
        """Read what is there.

        Raises:
            ValueError: a line is not one of ours; names it.
        """
        self.path = None if path is None else Path(path)
        self._found: dict[str, dict[str, Any]] = {}
        if self.path is None or not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
            try:
                record = json.loads(line)
                self._found[record["key"]] = record | {"reply": record["reply"]}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}:{number} is no answer that was written here: {error!r}; remove "
                    "the file, or give another output"
                ) from error
        if len(whole) < len(data):
            self.path.write_bytes(whole)

    def __contains__(self, key: str) -> bool:
        """Whether there is a record of this key."""
        return key in self._found

    def __getitem__(self, key: str) -> dict[str, Any]:
        """The record of this key, the newest if there are several."""
        return self._found[key]

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append records, each with its ``key``."""
        lines = [json.dumps(dict(record), allow_nan=False) for record in records]
        # As they will be read back.
        self._found.update({record["key"]: record for record in map(json.loads, lines)})
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines)


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
    again say what they would have said. Scores are taken anew from replies that were read back.

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
    if missing:
        config = system_replies.stopping(asked.config, tokenizer)
        batches = system_replies.batches(
            system, [prompts[i] for i in missing], config,
            seed=asked.seed, pad_token_id=tokenizer.pad_id, max_length=asked.max_length,
            batch_size=asked.batch_size, numbers=missing,
            width=width or max(map(len, prompts)),
        )  # fmt: skip
        at = 0
        for decoded in batches:
            replies = system_replies.replies(tokenizer, decoded, config.stop)
            rows = missing[at : at + len(replies.texts)]
            records = [
                {"key": keys[i], "system": system.name, "weights": asked.weights[system.name]}
                | dict(cell)
                | {
                    "index": i,
                    "prompt": tokenizer.decode(prompts[i], skip_special=False),
                    "reply": text,
                    "tokens": int(length),
                    "steps": int(steps),
                }
                | dict(score(i, text))
                for i, text, length, steps in zip(
                    rows, replies.texts, replies.lengths, np.asarray(decoded.steps), strict=True
                )
            ]
            answers.add(records)
            report(len(rows))
            at += len(rows)
    found = [answers[key] for key in keys]
    return [record | dict(score(i, record["reply"])) for i, record in enumerate(found)]

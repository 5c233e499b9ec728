"""The parts of ``experiments.evaluate``: each asks the loaded systems one thing."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

from experiments import _stages
from experiments._evaluation import EvaluateConfig, Loaded
from memdlm_jax import processes, storage
from memdlm_jax.data import sources
from memdlm_jax.data.corpora import SourceConfig
from memdlm_jax.data.needles import Episode, string_match_all
from memdlm_jax.data.sft import EncodeConfig, Encoder, Row
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation import (
    asking,
    comparison,
    exposure_bias,
    likelihood,
    needles,
    retrieval,
    tasks,
)
from memdlm_jax.evaluation.asking import Answers, Asked
from memdlm_jax.evaluation.needles import Answerer, NeedleSuite
from memdlm_jax.evaluation.samples import sample_replies
from memdlm_jax.evaluation.systems import System
from memdlm_jax.evaluation.tasks import Cell
from memdlm_jax.progress import Progress


def haystack(config: EvaluateConfig) -> list[str]:
    """Sentences of the haystacks, of the split that everything comes from."""
    source = SourceConfig("text", config.haystack) if config.haystack else config.source
    return source.corpus.sentences(source, config.split)


def ask_needles(
    config: EvaluateConfig, loaded: Loaded, suite: NeedleSuite, answers: Answers
) -> dict[str, Any]:
    """Needle accuracy of every system.

    Raises:
        ValueError: before anything is asked, if an answer is longer than ``decode.length``.
    """
    asked = Asked(
        loaded.tokenizer, config.decode, loaded.max_length, config.batch_size, config.seed,
        loaded.weights,
    )  # fmt: skip
    total = len(loaded.systems) * len(suite.cells) * suite.episodes
    with Progress("needles", total, "question") as bar:

        def answerer(system: System) -> Answerer:
            cells = iter(suite.cells)  # Asked in this order, each once.

            def answer(episodes: Sequence[Episode]) -> list[str]:
                def score(i: int, reply: str) -> dict[str, Any]:
                    values = episodes[i].values
                    found = {"score": string_match_all(reply, values)}
                    return {"scores": found, "references": values, "depth": episodes[i].depth}

                cell = next(cells)
                facts = {"task": "needles", "length": cell.length, "num_keys": cell.num_keys}
                examples = [e.example(f"needle {i}") for i, e in enumerate(episodes)]
                rows = asking.ask(asked, system, facts, examples, score, answers, bar.update)
                return [row["reply"] for row in rows]

            return answer

        systems = {system.name: answerer(system) for system in loaded.systems}
        found = needles.evaluate(
            suite, loaded.tokenizer, haystack(config), systems, config.decode.length
        )
    return {"needles": found}


def make_tasks(config: EvaluateConfig, loaded: Loaded) -> list[tuple[Cell, DecodeConfig]]:
    """The questions of the benchmark tasks, each cell with the sampler of its answers.

    Raises:
        ValueError: a task does not fit its length, a length the models, or the sampler a task's
            answers.
        FileNotFoundError: a file of questions is not there.
    """
    suite = config.tasks
    assert suite is not None
    if max(suite.lengths) > loaded.max_length:
        raise ValueError(
            f"tasks.lengths has {max(suite.lengths)}: it must be at most {loaded.max_length}, the "
            "longest canvas (max_length, or what the models are meant for)"
        )
    made = []
    total = len(suite.names) * len(suite.lengths) * len(suite.seeds)
    with Progress("drawing questions", total, "cell", brief=True) as bar:
        for cell in tasks.cells(suite, loaded.tokenizer, haystack(config)):
            sampler = dataclasses.replace(config.task_decode, length=cell.answer_tokens)
            made.append((cell, sampler))
            bar.update()
    return made


def ask_tasks(
    config: EvaluateConfig,
    loaded: Loaded,
    made: Sequence[tuple[Cell, DecodeConfig]],
    answers: Answers,
) -> dict[str, Any]:
    """Scores of every system on the benchmark tasks."""
    suite, found = config.tasks, []
    assert suite is not None
    total = len(made) * suite.samples * len(loaded.systems)
    with Progress("tasks", total, "question") as bar:
        for cell, sampler in made:
            asked = Asked(
                loaded.tokenizer, sampler, loaded.max_length, config.batch_size, cell.seed,
                loaded.weights,
            )  # fmt: skip
            # One width, and so one compilation, for all tasks of a length and an answer's length.
            width = max(cell.length - cell.answer_tokens, 0)
            records = {
                system.name: asking.ask(
                    asked, system, _facts(cell), [q.example for q in cell.questions],
                    _scorer(cell), answers, bar.update, width,
                )
                for system in loaded.systems
            }  # fmt: skip
            found.append((cell, records))
            if processes.is_first() and not sys.stderr.isatty():
                print(_line(cell, records), file=sys.stderr, flush=True)
    return {
        "tasks": {
            "suite": dataclasses.asdict(suite),
            "cells": [comparison.cell_results(cell, records) for cell, records in found],
            "comparisons": comparison.comparisons(found),
        }
    }


def _facts(cell: Cell) -> dict[str, Any]:
    return {"task": cell.task, "length": cell.length, "question_seed": cell.seed}


def _scorer(cell: Cell) -> Callable[[int, str], dict[str, Any]]:
    def score(i: int, reply: str) -> dict[str, Any]:
        question = cell.questions[i]
        scores = cell.score(i, reply)
        return {"scores": scores, "references": question.references, "depth": question.depth}

    return score


def _line(cell: Cell, records: comparison.Records) -> str:
    own = cell.score_names[0]
    means = (f"{name} {comparison.scores(r, own).mean():.1%}" for name, r in records.items())
    return f"{cell.task} {cell.length} tokens, seed {cell.seed}: {', '.join(means)}"


def read_held_out(config: EvaluateConfig, loaded: Loaded) -> dict[str, Any]:
    """Held-out loss and exposure bias of every system, and some replies."""
    held, systems, tokenizer = config.held_out, loaded.systems, loaded.tokenizer
    rows = held_out_rows(config, loaded)
    results: dict[str, Any] = {}
    where = {"pad_token_id": tokenizer.pad_id, "batch_size": config.batch_size}
    if config.likelihood:
        results["likelihood"] = likelihood.evaluate(systems, rows, config.likelihood, **where)
    if config.exposure:
        results["exposure"] = exposure_bias.evaluate(systems, rows, config.exposure, **where)
    room = loaded.max_length - config.reply.length
    short = [row for row in rows if 0 < row.prompt_length <= room]
    if chosen := list(itertools.islice(short, held.samples)):
        results["samples"], results["history"] = sample_replies(
            systems, tokenizer, chosen, config.reply,
            seed=config.seed, max_length=loaded.max_length,
        )  # fmt: skip
    return results


def held_out_rows(config: EvaluateConfig, loaded: Loaded) -> list[Row]:
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
        encoder = Encoder(loaded.tokenizer, EncodeConfig(held.max_length))
        found = config.source.corpus.examples(config.source, config.split, encoder, config.seed)
        examples = list(found)
        taken = f"{len(examples)} examples of the {config.source.kind} corpus"
    groups = len({example.group for example in examples})
    try:
        rows = likelihood.held_out_rows(
            examples, loaded.tokenizer,
            max_length=held.max_length, count=held.rows, seed=config.seed,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(
            f"the split {split!r} has {taken}, in {groups} groups: {error}. Give "
            "more groups, or set held_out.split='all' for a file that is all held out"
        ) from error
    if processes.is_first():
        print(
            f"held-out: {len(rows)} rows, one a group, of {groups} groups ({taken}, split "
            f"{split!r})",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return rows


def probe_retrieval(config: EvaluateConfig, loaded: Loaded) -> dict[str, Any]:
    """What the memory knows of a prompt that is taken away."""
    assert config.retrieval is not None
    found = retrieval.evaluate(
        loaded.systems, config.retrieval, loaded.tokenizer, haystack(config), config.decode,
        max_length=loaded.max_length, seed=config.seed, batch_size=config.batch_size,
    )  # fmt: skip
    return {"retrieval": found}


def remembered(
    config: EvaluateConfig, loaded: Loaded, name: str, compute: Callable[[], dict[str, Any]]
) -> _stages.Stage:
    """A part that asks no questions one by one: computed once for these settings and weights.

    Returns:
        (its results, the seconds it took when it was computed).
    """
    settings = dataclasses.asdict(config)
    settings["source"] = config.source.corpus.fingerprint(config.source)
    if config.haystack and config.retrieval:
        settings["haystack"] = _stages.digest(haystack(config))
    for unread in ("output", "mdlm", "memdlm", "under", "needles", "tasks", "task_decode"):
        settings.pop(unread)
    if config.held_out.path:
        settings["held_out"]["path"] = _content(config.held_out.path)
    key = _stages.digest([settings, loaded.weights, loaded.tokenizer.digest()])
    return _stages.stage(storage.path(config.output) / "parts" / f"{name}-{key}.json", compute)


def _content(path: str) -> str:
    """Digest of a file, so that another content is other data."""
    return _stages.digest(storage.path(path).read_text(encoding="utf-8"))

"""In-weight retrieval: what the model still knows of a context that it can no longer see.

The claim under test is that a prompt written into fast weights can be retrieved from them, not by
attention alone (Pei et al., arXiv 2603.22241). So the memory is written on a prompt, the context is
then taken away, and the question is asked: with memory off, on, and with a memory that was written
on another prompt, which shows what any writing does.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import numpy as np

from memdlm_jax.data.filler import Filler
from memdlm_jax.data.needles import (
    Episode,
    NeedleConfig,
    NeedleTask,
    chance_floor,
    string_match_all,
)
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation import (
    needles,
    retrieval_answers,
    retrieval_attention,
    retrieval_probes,
    statistics,
)
from memdlm_jax.evaluation.needles import NeedleSuite, Outcome
from memdlm_jax.evaluation.retrieval_answers import CONDITIONS, Answers, Memory, Run, Written
from memdlm_jax.evaluation.retrieval_probes import Condition, Probe
from memdlm_jax.evaluation.systems import System
from memdlm_jax.progress import Progress

SCORES = ("at_once", "left_to_right")
PAIRS: tuple[tuple[Memory, Memory], ...] = (("off", "on"), ("control", "on"), ("off", "control"))
_MOST_TRIES = 1000
_APART = 10**9
"""Between an episode and those that may be its control; no suite asks as many."""


@dataclasses.dataclass(frozen=True)
class RetrievalConfig:
    """Which needles are probed, and how.

    Attributes:
        task: what all cells share; its ``length`` and ``num_keys`` are replaced.
        lengths: tokens of the encoded rows.
        num_keys: keys in the haystack.
        episodes: questions of each cell, at least 2.
        seed: of the stream of episodes, the same as a ``NeedleSuite`` of that seed asks.
        written: what goes into memory, the whole ``prompt`` (as ``memdlm`` does) or the
            ``context`` alone, the haystack without the question.
        conditions: what becomes of the context when the question is asked: ``full``, it is in
            view; ``removed``; ``masked``, mask tokens in its place; ``blind``, hidden from
            attention, positions kept.
        attention: measure the attention on the needle, too.
    """

    task: NeedleConfig = dataclasses.field(default_factory=lambda: NeedleConfig(split="test"))
    lengths: tuple[int, ...] = (192,)
    num_keys: tuple[int, ...] = (4,)
    episodes: int = 100
    seed: int = 0
    written: Written = "prompt"
    conditions: tuple[Condition, ...] = CONDITIONS
    attention: bool = True

    def __post_init__(self):
        for name in ("lengths", "num_keys", "conditions"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"retrieval.{name} is empty: at least one value is needed")
            if len(set(values)) < len(values):
                raise ValueError(f"retrieval.{name}={values} must not repeat a value")
        for name, least in (("episodes", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"retrieval.{name}={getattr(self, name)} must be at least {least}")
        if self.written not in get_args(Written):
            raise ValueError(f"retrieval.written={self.written!r} must be 'prompt' or 'context'")
        if unknown := set(self.conditions) - set(CONDITIONS):
            raise ValueError(
                f"retrieval.conditions has {sorted(unknown)}; there are {', '.join(CONDITIONS)}"
            )

    @property
    def cells(self) -> list[NeedleConfig]:
        """The task of every cell, lengths first."""
        return NeedleSuite(self.task, self.lengths, self.num_keys, self.episodes, self.seed).cells


def draw(
    config: RetrievalConfig, tokenizer: Tokenizer, filler: Sequence[str]
) -> dict[NeedleConfig, tuple[list[Probe], list[Probe]]]:
    """The probes of every cell and, for the control, one other of its kind for each.

    Cell c asks the episodes ``c * episodes`` and on of the stream, as ``needles.draw_episodes``
    does. The others are far behind in the stream, so that no row depends on another or on the
    number of cells, and hold none of the values that their row asks for.

    Raises:
        ValueError: a length is too short for its needles, there is no filler, or values are so few
            that no other episode is free of those asked for.
    """
    sentences = Filler(filler, tokenizer) if config.task.haystack == "text" else ()
    tasks = [NeedleTask(cell, tokenizer, sentences) for cell in config.cells]
    n, drawn = config.episodes, {}
    for c, task in enumerate(tasks):
        indices = range(c * n, (c + 1) * n)
        asked = [task.episode(config.seed, index) for index in indices]
        others = [_other(task, config.seed, *each) for each in zip(asked, indices, strict=True)]
        drawn[task.config] = (_encoded(asked, tokenizer), _encoded(others, tokenizer))
    return drawn


def _other(task: NeedleTask, seed: int, asked: Episode, index: int) -> Episode:
    """An episode that holds none of the asked values; it hangs on the index alone."""
    passage = retrieval_probes.of_episode(asked)
    for far in range(1, _MOST_TRIES + 1):
        other = task.episode(seed, index + far * _APART)
        if not retrieval_probes.conflict(passage, retrieval_probes.of_episode(other)):
            return other
    raise ValueError(
        f"num_keys={task.config.num_keys} and value_digits={task.config.value_digits}: none of "
        f"{_MOST_TRIES} other episodes is free of the asked values; ask for more digits"
    )


def _encoded(episodes: Iterable[Episode], tokenizer: Tokenizer) -> list[Probe]:
    return [
        retrieval_probes.encode(retrieval_probes.of_episode(episode), tokenizer)
        for episode in episodes
    ]


def evaluate(
    systems: Sequence[System],
    config: RetrievalConfig,
    tokenizer: Tokenizer,
    filler: Sequence[str],
    decode: DecodeConfig,
    *,
    max_length: int,
    seed: int = 0,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Ask every system the same episodes of every cell, their context in view or taken away.

    Args:
        systems: those with memory are probed with it off, on, and written on another prompt;
            those without only off.
        config: the cells.
        tokenizer: measures lengths.
        filler: sentences of the haystacks.
        decode: sampler of the answers.
        max_length: longest canvas in tokens.
        seed: of the memory's draws and the sampling noise.
        batch_size: rows at a time.

    Returns:
        JSON-ready ``{"config", "cells": [{"length", "num_keys", "n", ..., "systems": {name:
        ...}}], "pooled": {name: ...}}``; a system's part is that of ``summarise``, over the
        episodes of all cells together where it is pooled, and in a cell also has ``attention``,
        see ``retrieval_attention.evaluate``, and ``samples``.

    Raises:
        TypeError, ValueError: before anything is asked, if a denoiser does not show its attention,
            a response is longer than the decoder's window, or a prompt than the canvas.
    """
    run = Run(decode, max_length, config.written, seed, batch_size)
    drawn = draw(config, tokenizer, filler)
    _check(systems, config, drawn, run, tokenizer.pad_id)
    cells: list[dict[str, Any]] = []
    asked: list[Probe] = []
    pooled: dict[str, list[dict]] = {system.name: [] for system in systems}
    each = len(config.conditions) * sum(len(retrieval_answers.memories(s)) for s in systems)
    with Progress("retrieval", each * sum(len(h) for h, _ in drawn.values()), "question") as bar:
        for task, (here, others) in drawn.items():
            cell: dict[str, Any] = _facts(task, here)
            for system in systems:
                found = {
                    memory: retrieval_answers.answer(
                        system, memory, here, others, run, tokenizer, config.conditions, bar.update
                    )
                    for memory in retrieval_answers.memories(system)
                }
                pooled[system.name].append(found)
                measured = summarise(found, here) | {"samples": _samples(found, here[:3])}
                if config.attention:
                    with bar.doing("measuring attention"):
                        measured["attention"] = retrieval_attention.evaluate(
                            system, here, run, tokenizer.pad_id
                        )
                cell["systems"][system.name] = measured
            cells.append(cell)
            asked.extend(here)
    return {
        "config": dataclasses.asdict(config),
        "cells": cells,
        "pooled": {name: summarise(_joined(found), asked) for name, found in pooled.items()},
    }


def _check(
    systems: Sequence[System], config: RetrievalConfig, drawn, run: Run, pad_token_id: int
) -> None:
    """See ``evaluate``."""
    wanted = config.conditions if not config.attention else (*config.conditions, "full")
    for system, condition in itertools.product(systems, wanted):
        if config.attention:
            retrieval_attention.transformer(system.denoiser)
        for here, _ in drawn.values():
            retrieval_answers.lay_out(here, condition, system, run, pad_token_id)


Found = Mapping[Memory, Mapping[Condition, Answers]]
"""What one system said, by memory and condition."""


def _facts(task: NeedleConfig, here: Sequence[Probe]) -> dict[str, Any]:
    """What is known of a cell without any model."""
    spans = [probe.context for probe in here]
    return {
        "length": task.length,
        "num_keys": task.num_keys,
        "n": len(here),
        "value_of_context_floor": chance_floor(task),
        "random_number_floor": needles.guessing_floor(task),
        "context_tokens": sum(stop - first for first, stop in spans) / len(here),
        "bare_tokens": sum(len(probe.bare) for probe in here) / len(here),
        "systems": {},
    }


def _joined(parts: Sequence[Found]) -> Found:
    """The answers of several cells in one."""

    def join(answers: Sequence[Answers]) -> Answers:
        arrays = (
            np.concatenate([getattr(a, name) for a in answers]) for name in (*SCORES, "tokens")
        )
        return Answers([text for a in answers for text in a.texts], *arrays)

    return {
        memory: {c: join([part[memory][c] for part in parts]) for c in conditions}
        for memory, conditions in parts[0].items()
    }


def _samples(found: Found, here: Sequence[Probe]) -> list[dict[str, Any]]:
    return [
        {"values": list(probe.passage.values)}
        | {m: {c: said.texts[i] for c, said in each.items()} for m, each in found.items()}
        for i, probe in enumerate(here)
    ]


def outcomes(answers: Answers, asked: Sequence[Probe]) -> list[Outcome]:
    """The replies, scored."""
    return [
        Outcome(
            reply=text,
            score=string_match_all(text, probe.passage.values),
            in_context=any(value in text for value in probe.passage.all_values),
            depth=probe.passage.depth,
        )
        for text, probe in zip(answers.texts, asked, strict=True)
    ]


def summarise(found: Found, asked: Sequence[Probe]) -> dict[str, Any]:
    """Accuracy and log-probabilities of one system, and what its memory changes.

    Args:
        found: what it said, by memory and condition.
        asked: the probes, two or more.

    Returns:
        JSON-ready ``{"conditions": {condition: {memory: ...}}, "comparisons": [...]}``. A memory's
        part is ``needles.summarise`` and ``at_once`` and ``left_to_right``: mean
        ``log_probability`` of the value tokens in nats per token, with its ``standard_error`` over
        the rows. A comparison is of two memories under one ``condition``, paired by row: the
        second's number less the first's for ``accuracy`` (exact McNemar test) and both scores
        (Student's t), each with a 95 % ``interval``, ``p_value``, and ``p_adjusted``, Holm's over
        the comparisons of this number in this list.
    """
    conditions = list(next(iter(found.values())))
    return {
        "conditions": {
            condition: {
                memory: needles.summarise(outcomes(answers[condition], asked))
                | {name: _log_probability(answers[condition], name) for name in SCORES}
                for memory, answers in found.items()
            }
            for condition in conditions
        },
        "comparisons": _compare(found, asked, conditions),
    }


def _log_probability(answers: Answers, name: str) -> dict[str, float]:
    mean, error = statistics.ratio_estimate(getattr(answers, name), answers.tokens)
    return {"log_probability": mean, "standard_error": error}


def _compare(
    found: Found, asked: Sequence[Probe], conditions: Sequence[Condition]
) -> list[dict[str, Any]]:
    """Every condition's pairs of memories."""
    compared: list[dict[str, Any]] = []
    for condition, (first, second) in itertools.product(conditions, PAIRS):
        if first in found and second in found:
            both = found[first][condition], found[second][condition]
            compared.append(
                {"condition": condition, "first": first, "second": second}
                | {"accuracy": _accuracies(*both, asked)}
                | {name: _scores(*both, name) for name in SCORES}
            )
    for name in ("accuracy", *SCORES):
        adjusted = statistics.holm([each[name]["p_value"] for each in compared])
        for each, p in zip(compared, adjusted, strict=True):
            each[name]["p_adjusted"] = p
    return compared


def _accuracies(first: Answers, second: Answers, asked: Sequence[Probe]) -> dict[str, Any]:
    right = [[o.correct for o in outcomes(answers, asked)] for answers in (first, second)]
    counts = statistics.paired(*right)
    return dataclasses.asdict(counts) | {
        "difference": counts.difference,
        "interval": list(counts.interval),
        "p_value": counts.p_value,
    }


def _scores(first: Answers, second: Answers, name: str) -> dict[str, Any]:
    change = getattr(second, name) - getattr(first, name)
    both = (*statistics.ratio_estimate(change, first.tokens), len(change))
    return {
        "difference": both[0],
        "standard_error": both[1],
        "interval": list(statistics.t_interval(*both)),
        "p_value": statistics.t_p_value(*both),
    }


def by_depth_and_length(cells: Iterable[tuple[int, Sequence[Mapping]]]) -> dict[str, Any]:
    """Accuracy by depth of the needle and length, for ``figures.heat_map``.

    Args:
        cells: (length, ``by_depth`` of ``needles.summarise``); those of one length are pooled, so
            they must be of different questions.

    Returns:
        JSON-ready ``{"lengths", "depths": [[from, to]], "cells": [lengths][depths] of {"value",
        "n", "interval"}}``, ``value`` being ``None`` where nothing was asked.

    Raises:
        ValueError: the cells are divided at different depths, or there is none.
    """
    found = list(cells)
    divisions = {tuple((part["from"], part["to"]) for part in parts) for _, parts in found}
    if len(divisions) != 1:
        raise ValueError(f"cells have {len(divisions)} divisions by depth; one is needed")
    depths = divisions.pop()
    lengths = sorted({length for length, _ in found})
    table = [
        [_pooled([parts[d] for at, parts in found if at == length]) for d in range(len(depths))]
        for length in lengths
    ]
    return {"lengths": lengths, "depths": [list(depth) for depth in depths], "cells": table}


def _pooled(parts: Sequence[Mapping]) -> dict[str, Any]:
    """Rates of disjoint questions in one."""
    n = sum(part["n"] for part in parts)
    hits = sum(round(part["value"] * part["n"]) for part in parts if part["n"])
    interval = statistics.wilson_interval(hits, n)
    return {"value": hits / n if n else None, "n": n, "interval": list(interval)}

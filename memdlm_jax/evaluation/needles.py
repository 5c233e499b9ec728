"""Needle accuracy: how often the asked value is found in the haystack, and bound to its key."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence

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
from memdlm_jax.evaluation import statistics
from memdlm_jax.evaluation.systems import System, prompt_ids, reply

DEPTH_BINS = 5

Answerer = Callable[[Sequence[Episode]], list[str]]
"""Replies to the prompts of the episodes, in order."""


@dataclasses.dataclass(frozen=True)
class NeedleSuite:
    """Cells of a comparison: every length with every number of keys.

    Attributes:
        task: what all cells share; its ``length`` and ``num_keys`` are replaced.
        lengths: tokens of the encoded rows.
        num_keys: keys in the haystack.
        episodes: questions of each cell.
        seed: of the stream of episodes; the same for all systems. Each cell has its own part of it.
    """

    task: NeedleConfig = dataclasses.field(default_factory=lambda: NeedleConfig(split="test"))
    lengths: tuple[int, ...] = (128, 256)
    num_keys: tuple[int, ...] = (4,)
    episodes: int = 200
    seed: int = 0

    def __post_init__(self):
        for name in ("lengths", "num_keys"):
            if not getattr(self, name):
                raise ValueError(f"needles.{name} is empty: at least one value is needed")
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"needles.{name}={getattr(self, name)} must not repeat a value")
        if self.episodes < 1:
            raise ValueError(f"needles.episodes={self.episodes} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"needles.seed={self.seed} must be at least 0")

    @property
    def cells(self) -> list[NeedleConfig]:
        """The task of every cell, lengths first."""
        return [
            dataclasses.replace(self.task, length=length, num_keys=keys)
            for length in self.lengths
            for keys in self.num_keys
        ]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One answered episode.

    Attributes:
        reply: the text that was generated.
        score: share of the asked values in the reply, in [0, 1] (RULER's string_match_all).
        in_context: the reply holds some value of the haystack, the right one or another.
        depth: where in the context the asked needle stood, in [0, 1].
    """

    reply: str
    score: float
    in_context: bool
    depth: float

    @property
    def correct(self) -> bool:
        """Whether every asked value was found."""
        return self.score == 1.0


def draw_episodes(
    suite: NeedleSuite, tokenizer: Tokenizer, filler: Sequence[str]
) -> dict[NeedleConfig, list[Episode]]:
    """The episodes of every cell: a pure function of the suite, the same for every system.

    Cell c asks the episodes ``c * suite.episodes`` and on of the stream. Tasks of as many keys draw
    the same keys and values for the same index, whatever their length: cells that shared indices
    would ask the same questions, and could not be pooled.

    Raises:
        ValueError: a length is too short for its needles, or there is no filler.
    """
    sentences = Filler(filler, tokenizer) if suite.task.haystack == "text" else ()
    tasks = [NeedleTask(cell, tokenizer, sentences) for cell in suite.cells]
    n = suite.episodes
    return {
        task.config: [task.episode(suite.seed, index) for index in range(c * n, (c + 1) * n)]
        for c, task in enumerate(tasks)
    }


def check_window(
    episodes: Mapping[NeedleConfig, Sequence[Episode]], tokenizer: Tokenizer, window: int
) -> None:
    """Refuse episodes whose answer has no room: no system could score on them.

    Args:
        episodes: of ``draw_episodes``.
        tokenizer: counts the tokens of the answers.
        window: tokens that a system may answer with, ``decode.length``.

    Raises:
        ValueError: the longest answer does not fit, with what it takes.
    """
    answers = [episode.response for asked in episodes.values() for episode in asked]
    longest = max(map(len, tokenizer.encode_batch(answers)))
    if longest > window:
        raise ValueError(
            f"decode.length={window} must be at least {longest}: so many tokens has the longest "
            "needle answer; ask for fewer values or digits, or raise it"
        )


def left_to_right(length: int) -> DecodeConfig:
    """The sampler for needle answers: a window of ``length`` tokens filled from left to right.

    A window longer than the answers of training is a canvas the model has not seen. Filled in any
    order, the end of the answer can be committed in its last columns first, and the answer then
    ends before its value, whatever the model retrieved.
    """
    return DecodeConfig(length=length, block_length=1)


def answerer(
    system: System,
    tokenizer: Tokenizer,
    config: DecodeConfig,
    *,
    seed: int = 0,
    max_length: int,
    batch_size: int = 8,
) -> Answerer:
    """A system as a function from episodes to replies; the arguments are those of ``reply``."""

    def answer(episodes: Sequence[Episode]) -> list[str]:
        prompts = [
            prompt_ids(tokenizer, episode.example(f"needle {i}"), max_length)
            for i, episode in enumerate(episodes)
        ]
        return reply(
            system, tokenizer, prompts, config,
            seed=seed, max_length=max_length, batch_size=batch_size,
        ).texts  # fmt: skip

    return answer


def oracle(episodes: Sequence[Episode]) -> list[str]:
    """Answer by reading the prompt's text alone: below a score of 1 the episodes are broken."""
    return [_read(episode.prompt) for episode in episodes]


def _read(prompt: str) -> str:
    key = re.findall(r"The special magic numbers? for (.+?) mentioned in", prompt)[-1]
    return ", ".join(re.findall(rf"numbers? for {re.escape(key)} is: (\d+)\.", prompt))


def evaluate_cell(episodes: Sequence[Episode], answer: Answerer) -> list[Outcome]:
    """Ask every episode and score the replies.

    Raises:
        ValueError: there are not as many replies as episodes.
    """
    return [_score(e, reply) for e, reply in zip(episodes, answer(episodes), strict=True)]


def _score(episode: Episode, reply: str) -> Outcome:
    return Outcome(
        reply=reply,
        score=string_match_all(reply, episode.values),
        in_context=any(value in reply for value in episode.all_values),
        depth=episode.depth,
    )


def guessing_floor(config: NeedleConfig) -> float:
    """Chance of all asked values being right, if numbers of their size are drawn at random."""
    return 1.0 / math.comb(9 * 10 ** (config.value_digits - 1), config.num_values)


def summarise(outcomes: Sequence[Outcome]) -> dict:
    """Counts, rates and 95 % intervals of one system in one cell, ready for JSON."""
    found = [outcome for outcome in outcomes if outcome.in_context]
    bins = [_depth_bin(outcome) for outcome in outcomes]
    return {
        "accuracy": _rate([o.correct for o in outcomes]),
        "mean_score": sum(o.score for o in outcomes) / len(outcomes),
        "in_context": _rate([o.in_context for o in outcomes]),
        "bound_if_in_context": _rate([o.correct for o in found]),
        "by_depth": [
            {"from": b / DEPTH_BINS, "to": (b + 1) / DEPTH_BINS}
            | _rate([o.correct for o, place in zip(outcomes, bins, strict=True) if place == b])
            for b in range(DEPTH_BINS)
        ],
    }


def _depth_bin(outcome: Outcome) -> int:
    return min(int(outcome.depth * DEPTH_BINS), DEPTH_BINS - 1)


def _rate(hits: Sequence[bool]) -> dict:
    """Proportion with its n and interval; the value is ``None`` where nothing was counted."""
    n, successes = len(hits), sum(hits)
    return {
        "value": successes / n if n else None,
        "n": n,
        "interval": list(statistics.wilson_interval(successes, n)),
    }


def compare(outcomes: Mapping[str, Sequence[Outcome]]) -> list[dict]:
    """Paired comparison of every two systems on the same episodes, ready for JSON.

    ``p_value`` is McNemar's exact test, ``p_adjusted`` Holm's for the comparisons of this list.
    """
    pairs = list(itertools.combinations(outcomes, 2))
    counts = [
        statistics.paired([o.correct for o in outcomes[a]], [o.correct for o in outcomes[b]])
        for a, b in pairs
    ]
    adjusted = statistics.holm([count.p_value for count in counts])
    return [
        {"first": a, "second": b}
        | dataclasses.asdict(count)
        | {"difference": count.difference, "interval": list(count.interval)}
        | {"p_value": count.p_value, "p_adjusted": p}
        for (a, b), count, p in zip(pairs, counts, adjusted, strict=True)
    ]


def evaluate(
    suite: NeedleSuite,
    tokenizer: Tokenizer,
    filler: Sequence[str],
    answerers: Mapping[str, Answerer],
    window: int | None = None,
) -> dict:
    """Ask every system the same episodes of every cell.

    Args:
        suite: the cells.
        tokenizer: measures lengths.
        filler: sentences of the haystacks.
        answerers: name -> answerer.
        window: tokens that they may answer with; ``None`` for no limit.

    Returns:
        JSON-ready ``{"suite", "cells": [...], "comparisons": [...]}``; the comparisons are over
        the episodes of all cells together, those inside a cell stand with the cell.

    Raises:
        ValueError: before anything is asked, if an answer is longer than the window.
    """
    drawn = draw_episodes(suite, tokenizer, filler)
    if window is not None:
        check_window(drawn, tokenizer, window)
    cells = []
    pooled: dict[str, list[Outcome]] = {name: [] for name in answerers}
    for task, episodes in drawn.items():
        outcomes = {name: evaluate_cell(episodes, answer) for name, answer in answerers.items()}
        for name, rows in outcomes.items():
            pooled[name].extend(rows)
        cells.append(_cell(task, episodes, outcomes))
    return {
        "suite": dataclasses.asdict(suite),
        "cells": cells,
        "comparisons": compare(pooled),
    }


def _cell(task: NeedleConfig, episodes: Sequence[Episode], outcomes: dict) -> dict:
    return {
        "length": task.length,
        "num_keys": task.num_keys,
        "n": len(episodes),
        "value_of_context_floor": chance_floor(task),
        "random_number_floor": guessing_floor(task),
        "oracle": summarise(evaluate_cell(episodes, oracle))["accuracy"]["value"],
        "systems": {name: summarise(rows) for name, rows in outcomes.items()},
        "comparisons": compare(outcomes),
        "samples": [
            {"question": episode.key, "values": list(episode.values)}
            | {name: rows[i].reply for name, rows in outcomes.items()}
            for i, episode in enumerate(episodes[:3])
        ],
    }

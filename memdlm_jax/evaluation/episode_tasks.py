"""What episodes can be about: needles, bAbI stories, facts of a conversation, or own JSON lines.

Responses that are words begin with a space, so that their tokens are those of the text.
"""

import dataclasses
import functools
from typing import Literal

import numpy as np

from memdlm_jax.data import sources
from memdlm_jax.data.episodes import (
    Episode,
    Episodes,
    ListedEpisodes,
    NeedleEpisodes,
    jsonl_episodes,
)
from memdlm_jax.data.example import Example
from memdlm_jax.data.needles import key_parts
from memdlm_jax.data.text import SPLITS, Split, check_at_least
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.evaluation import babi

Kind = Literal["needles", "qa1", "qa2", "conversation", "jsonl"]

THINGS = ("dog", "cat", "brother", "sister", "boat", "village", "teacher", "horse", "shop", "band")
"""What people tell about in a conversation."""


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """One kind of episodes.

    Attributes:
        kind: ``needles``: keys with magic numbers; ``qa1``, ``qa2``: stories in the manner of bAbI;
            ``conversation``: facts that a user told in earlier turns; ``jsonl``: own episodes.
        keys: needles of a text, or facts of a conversation.
        tokens: of a text, which sentences fill up; 0 for none (needles and conversation).
        questions: of a text.
        path: file of own episodes.
        sentences: most sentences of a story; longer ones are drawn again.
    """

    kind: Kind = "needles"
    keys: int = 4
    tokens: int = 0
    questions: int = 4
    path: str = ""
    sentences: int = 8

    def __post_init__(self):
        for field in ("keys", "questions"):
            check_at_least(field, getattr(self, field), 1)
        check_at_least("tokens", self.tokens, 0)
        check_at_least("sentences", self.sentences, 3)
        if (self.kind == "jsonl") != bool(self.path):
            raise ValueError(f"path={self.path!r} must be given with kind='jsonl', and only there")
        if self.kind == "conversation" and not self.questions <= self.keys <= len(THINGS):
            raise ValueError(
                f"keys={self.keys} must be from questions={self.questions} to {len(THINGS)}"
            )

    @property
    def name(self) -> str:
        """Short and unique."""
        if self.kind == "needles":
            return f"needles_{self.keys}" + (f"_in_{self.tokens}" if self.tokens else "")
        return self.kind


def episodes_of(config: TaskConfig, split: Split, tokenizer: Tokenizer) -> Episodes:
    """The episodes of a task in one split.

    Raises:
        ValueError, FileNotFoundError: see ``jsonl_episodes``.
        ImportError: words or sentences are not installed.
    """
    if config.kind == "jsonl":
        found = jsonl_episodes(config.path, split)
        if not found:
            raise ValueError(f"path={config.path!r} has no episode of the split {split!r}")
        return ListedEpisodes(tuple(found))
    if config.kind in ("qa1", "qa2"):
        return StoryEpisodes(config.kind, config.sentences, config.questions, split)
    sentences = _sentences(split) if config.tokens or config.kind == "conversation" else ()
    size = config.keys, config.tokens, config.questions, split, tokenizer, sentences
    return (NeedleEpisodes if config.kind == "needles" else ConversationEpisodes)(*size)


@functools.cache
def _sentences(split: Split) -> tuple[str, ...]:
    """Short sentences of real conversations."""
    return tuple(s for s in sources.chitchat_sentences(split) if len(s.split()) < 15)


@dataclasses.dataclass(frozen=True)
class StoryEpisodes:
    """Stories of a bAbI-like task.

    Attributes:
        task: ``qa1`` asks where people are, ``qa2`` where objects are.
        sentences: most sentences of a story.
        questions: of a story; ``qa1`` can ask about several people, ``qa2`` asks one.
        split: streams of different splits draw different stories.
    """

    task: Literal["qa1", "qa2"]
    sentences: int
    questions: int
    split: Split

    def __post_init__(self):
        most = 1 if self.task == "qa2" else 2
        if self.questions > most:
            raise ValueError(
                f"questions={self.questions} must be at most {most} with kind={self.task!r}"
            )

    def episode(self, seed: int, index: int) -> Episode:
        """See ``Episodes``."""
        rng = np.random.default_rng([seed, SPLITS.index(self.split), index, 7])
        while True:
            story = babi.draw_story(self.task, rng)
            asked = {story.question: story.answer}
            if self.task == "qa1":
                for fact in story.facts:
                    words = fact.rstrip(".").split()
                    question = f"Where is {words[0]}?"
                    if question != story.question:
                        asked[question] = words[-1]
            if len(story.facts) <= self.sentences and len(asked) >= self.questions:
                break
        group = f"{self.task}/{seed}/{index}"
        pairs = list(asked.items())[: self.questions]
        questions = tuple(Example(q, f" {a}", group, self.task) for q, a in pairs)
        return Episode(tuple(story.facts), questions, babi.PLACES, group)


@dataclasses.dataclass(frozen=True)
class ConversationEpisodes:
    """Names that a user told in passing, asked in a later turn.

    Attributes:
        keys: facts of a conversation.
        tokens: of the text, which sentences of real conversations fill up; 0 for facts alone.
        questions: facts that are asked for.
        split: whose words the names are made of.
        tokenizer: counts tokens.
        sentences: what else was said.
    """

    keys: int
    tokens: int
    questions: int
    split: Split
    tokenizer: Tokenizer
    sentences: tuple[str, ...]

    def episode(self, seed: int, index: int) -> Episode:
        """See ``Episodes``."""
        rng = np.random.default_rng([seed, SPLITS.index(self.split), index, 8])
        (words,) = key_parts(1, self.split)
        short = _short_names(words, self.tokenizer)
        names = [short[i].capitalize() for i in rng.choice(len(short), self.keys, replace=False)]
        things = [THINGS[i] for i in rng.choice(len(THINGS), self.keys, replace=False)]
        pieces = [f"User: my {t} is called {n}." for t, n in zip(things, names, strict=True)]
        room = self.tokens - sum(len(self.tokenizer.encode(p)) for p in pieces)
        while self.tokens:
            said = f"User: {self.sentences[int(rng.integers(len(self.sentences)))]}"
            room -= len(self.tokenizer.encode(said))
            if room < 0:
                break
            pieces.insert(int(rng.integers(len(pieces) + 1)), said)
        group = f"conversation/{seed}/{index}"
        questions = tuple(
            Example(f"What is my {things[i]} called?", f" {names[i]}", group, "conversation")
            for i in rng.choice(self.keys, self.questions, replace=False)
        )
        return Episode(tuple(pieces), questions, tuple(names), group)


@functools.lru_cache(maxsize=8)
def _short_names(words: tuple[str, ...], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Words whose name takes at most two tokens."""
    return tuple(w for w in words if len(tokenizer.encode(f" {w.capitalize()}")) <= 2)

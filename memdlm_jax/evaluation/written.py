"""Questions about texts that are gone: what memory answers, and what it is compared with.

``ask`` puts the same questions five times or fewer: with the memory of their own text (``on``),
without memory (``off``), with the memory of another text (``other``), and with the text in the
context and no memory (``context``).
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import jax
import numpy as np

from memdlm_jax.data.episodes import Episode, EpisodeBatches
from memdlm_jax.data.example import Example
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion import canvas
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation import systems
from memdlm_jax.evaluation.systems import System
from memdlm_jax.inference import generation
from memdlm_jax.inference.generation import Generator, Prompts
from memdlm_jax.memory import written
from memdlm_jax.memory.inner_loop import InnerLoop, InnerParameters
from memdlm_jax.typing import Key, Phi, Texts, Theta

Way = Literal["on", "off", "other", "context"]
WAYS: tuple[Way, ...] = get_args(Way)


@dataclasses.dataclass(frozen=True)
class Right:
    """Right answers of one way of asking.

    Attributes:
        correct: [n] bool, exact match of each question.
        replies: [n] what was answered.
    """

    correct: np.ndarray
    replies: list[str]

    @property
    def accuracy(self) -> float:
        """Share of right answers, in [0, 1]."""
        return float(np.mean(self.correct))


def matches(reply: str, answer: str) -> bool:
    """Whether a reply is the answer, but for white space, case and a full stop at its end."""
    return _plain(reply) == _plain(answer)


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()


def guessing(episodes: Sequence[Episode]) -> float:
    """Chance of a right answer by drawing one of the answers of the own text, in (0, 1]."""
    shares = [1 / max(len(set(episode.answers)), 1) for episode in episodes]
    return float(np.mean(shares))


@dataclasses.dataclass(frozen=True)
class Asker:
    """Asks one system about batches of episodes of one size.

    Attributes:
        system: who answers, with an inner loop.
        batches: encodes episodes; its config has the sizes of the texts.
        config: sampler; ``length`` is the most tokens of an answer with its end.
        max_length: longest canvas in tokens.
        seed: of the memory's draws and of the sampling.
    """

    system: System
    batches: EpisodeBatches
    config: DecodeConfig
    max_length: int
    seed: int = 0

    def ask(self, episodes: Sequence[Episode], ways: Iterable[Way] = WAYS) -> dict[Way, Right]:
        """Put all questions in each of these ways.

        Args:
            episodes: at least two for ``other``, which reads the memory of the text before.
            ways: see the module.

        Raises:
            ValueError: an episode does not fit, or there are too few for ``other``.
        """
        size = self.batches.config.texts
        ways = tuple(ways)
        if "other" in ways and len(episodes) < 2:
            raise ValueError("way='other' needs at least 2 episodes")
        found: dict[Way, list[str]] = {way: [] for way in ways}
        for start in range(0, len(episodes), size):
            some = episodes[start : start + size]
            # Filled up, so that all batches share a compilation.
            batch = [episodes[(start + i) % len(episodes)] for i in range(size)]
            key = jax.random.fold_in(jax.random.key(self.seed), start)
            # Of every text the one before, also across batches.
            others = [episodes[(start + i - 1) % len(episodes)] for i in range(size)]
            for way in ways:
                texts = {"on": batch, "other": others}.get(way)
                memory = None if texts is None else self._write(key, texts)
                replies = self._replies(key, batch, way, memory)
                found[way] += replies[: len(some) * self.batches.config.questions]
        answers = [q.response for e in episodes for q in self._asked(e)]
        return {
            way: Right(np.array(list(map(matches, replies, answers))), replies)
            for way, replies in found.items()
        }

    def _asked(self, episode: Episode) -> Sequence[Example]:
        return episode.questions[: self.batches.config.questions]

    def _write(self, key: Key, batch: Sequence[Episode]) -> Phi:
        texts = self.batches.batch_of(batch).context
        loop, theta, learned = self._memory()
        return _write(loop, key, theta, learned, texts)

    def _memory(self) -> tuple[InnerLoop, Theta, InnerParameters | None]:
        system = self.system
        if system.inner_loop is None:
            raise ValueError(f"{system.name} has no inner loop: it cannot write texts")
        return system.inner_loop, system.theta, system.learned

    def _replies(self, key: Key, batch: Sequence[Episode], way: Way, memory: Phi) -> list[str]:
        tokenizer = self.batches.tokenizer
        prompts = []
        for episode in batch:
            for question in self._asked(episode):
                asked = question
                if way == "context":
                    asked = with_context(episode, question)
                room = self.max_length - self.config.length
                prompts.append(systems.prompt_ids(tokenizer, asked, room))
        config = systems.stopping(self.config, tokenizer)
        width = systems.rounded(max(map(len, prompts)))
        tokens, valid = canvas.pad_left(prompts, width, tokenizer.pad_id)
        loop = None if memory is None else self.system.inner_loop
        generator = Generator(self.system.denoiser, loop, config)
        keys = jax.random.split(key, len(prompts))
        decoded = generation.generate(
            generator, self.system.theta, Prompts(keys, tokens, valid), None, memory
        )
        return systems.replies(tokenizer, jax.device_get(decoded), config.stop).texts


def with_context(episode: Episode, question: Example) -> Example:
    """The question behind its text, in one prompt."""
    if not isinstance(question.prompt, str):
        raise TypeError("a question with its text in the context must be a single prompt")
    text = " ".join(episode.pieces)
    return dataclasses.replace(question, prompt=f"{text}\n{question.prompt}")


@functools.partial(jax.jit, static_argnums=0)
def _write(inner_loop: InnerLoop, key, theta, learned, texts: Texts) -> Phi:
    return written.write_texts(key, inner_loop, theta, texts, learned)[0]


def decoding(tokenizer: Tokenizer, episodes: Sequence[Episode]) -> DecodeConfig:
    """A sampler that can give the longest answer of these episodes, with its end."""
    answers = {q.response for episode in episodes for q in episode.questions}
    length = 1 + max(len(tokenizer.encode(answer)) for answer in answers)
    return DecodeConfig(length=length, block_length=length, steps=length)

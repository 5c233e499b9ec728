"""Examples to rows of ids, with the asymmetric mask of supervised fine-tuning.

A conversation becomes ``<|user|> text <|eos|> <|assistant|> text <|eos|> ...``; the prompt ends
with the ``<|assistant|>`` that opens the response. Bare text has no turns. The prompt is never
masked; every id of the response may be, its final ``<|eos|>`` included (LLaDA, arXiv 2502.09992,
section 2.3).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int

from memdlm_jax.data.example import Example, Message
from memdlm_jax.data.text import check_at_least, check_choice
from memdlm_jax.data.tokenizer import Tokenizer

LongPrompt = Literal["drop", "truncate_left"]
LongResponse = Literal["drop", "error"]
DropReason = Literal["prompt_too_long", "response_too_long"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One encoded example.

    Attributes:
        tokens: [n] int32, prompt and response.
        prompt_length: ids that are never masked, in [0, n).
    """

    tokens: Int[np.ndarray, "n"]
    prompt_length: int


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """What to do with examples that are too long.

    Attributes:
        max_length: ids of the longest row.
        long_prompt: ``drop`` the example, or ``truncate_left``: leave out whole oldest turns until
            the rest fits; the last turn is never cut.
        long_response: ``drop`` an example whose response alone has no room, or stop with an
            ``error``. A response is never cut: its end would be missing.
    """

    max_length: int = 512
    long_prompt: LongPrompt = "drop"
    long_response: LongResponse = "drop"

    def __post_init__(self):
        check_at_least("max_length", self.max_length, 8)
        check_choice("long_prompt", self.long_prompt, get_args(LongPrompt))
        check_choice("long_response", self.long_response, get_args(LongResponse))


class Encoder:
    """Encodes examples one by one; turns of a conversation are tokenised once."""

    def __init__(self, tokenizer: Tokenizer, config: EncodeConfig):
        """Keep the tokenizer and the policy."""
        self.tokenizer = tokenizer
        self.config = config
        self._ids = functools.lru_cache(maxsize=1024)(tokenizer.encode)

    def encode(self, example: Example) -> Row | DropReason:
        """The row of an example, or the reason for which it is dropped.

        Raises:
            ValueError: the response is too long and the policy for that is ``error``.
        """
        response = [*self._ids(example.response), self.tokenizer.eos_id]
        turns = [self._turn(message) for message in example.messages]
        opening = [self.tokenizer.assistant_id] if _has_turns(example) else []
        opening += self.tokenizer.encode(example.prefix)
        room = self.config.max_length - len(opening) - len(response)
        if room < 0:
            return self._response_too_long(example, len(opening) + len(response))
        first = _first_turn_that_fits(turns, room)
        if first == len(turns) > 0 or (first > 0 and self.config.long_prompt == "drop"):
            return "prompt_too_long"
        prompt = [i for turn in turns[first:] for i in turn] + opening
        return Row(np.asarray(prompt + response, np.int32), len(prompt))

    def _response_too_long(self, example: Example, length: int) -> DropReason:
        """Drop or stop, as the policy says."""
        if self.config.long_response == "error":
            raise ValueError(
                f"the response of group {example.group!r} ({example.source}) takes {length} ids, "
                f"max_length={self.config.max_length} must be at least that; or drop such rows "
                "with long_response='drop'"
            )
        return "response_too_long"

    def _turn(self, message: Message) -> list[int]:
        """Ids of one turn with its special tokens; bare text has none."""
        role, text = message
        ids = self._ids(text)
        if role == "text":
            return ids
        opening = self.tokenizer.user_id if role == "user" else self.tokenizer.assistant_id
        return [opening, *ids, self.tokenizer.eos_id]


def _has_turns(example: Example) -> bool:
    """Whether the response is a turn of its own instead of the end of a text."""
    return bool(example.messages) and example.messages[-1][0] != "text"


def _first_turn_that_fits(turns: Sequence[Sequence[int]], room: int) -> int:
    """Index of the oldest turn from which on all turns fit; ``len(turns)`` if none does."""
    first = len(turns)
    while first > 0 and len(turns[first - 1]) <= room:
        first -= 1
        room -= len(turns[first])
    return first

"""Examples to rows of ids, with the asymmetric mask of supervised fine-tuning.

A conversation becomes ``<|user|> text <|eos|> <|assistant|> text <|eos|> ...``; the prompt ends
with the ``<|assistant|>`` that opens the response. A tokenizer with a chat template renders the
prompt with it instead, and its response ends with the template's end of turn. Bare text has no
turns. The prompt is never masked; every id of the response may be, its end included (LLaDA, arXiv
2502.09992, section 2.3).
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
            the rest fits; the last turn is never cut. With a chat template the rest begins with a
            turn of the user, because many templates refuse anything else.
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
            ValueError: the response is too long and the policy for that is ``error``; or the
                tokenizer can open no turn, or its template refuses the conversation.
        """
        has_turns = _has_turns(example)
        end = self.tokenizer.end_of_turn_id if has_turns else self.tokenizer.eos_id
        response = [*self._ids(example.response), end]
        opening = self.tokenizer.encode(example.prefix)
        templated = has_turns and self.tokenizer.chat is not None
        if has_turns and not templated:
            opening = [self.tokenizer.assistant_id, *opening]
        room = self.config.max_length - len(opening) - len(response)
        if room < 0:
            return self._response_too_long(example, len(opening) + len(response))
        before = (self._rendered if templated else self._joined_turns)(example.messages, room)
        if before is None:
            return "prompt_too_long"
        prompt = before + opening
        return Row(np.asarray(prompt + response, np.int32), len(prompt))

    def _joined_turns(self, messages: Sequence[Message], room: int) -> list[int] | None:
        """Ids of the turns that fit, each with its own tokens; ``None`` if the policy drops."""
        turns = [self._turn(message) for message in messages]
        first = _first_turn_that_fits(turns, room)
        if first == len(turns) > 0 or (first > 0 and self.config.long_prompt == "drop"):
            return None
        return [i for turn in turns[first:] for i in turn]

    def _rendered(self, messages: Sequence[Message], room: int) -> list[int] | None:
        """Ids of the chat template for the turns that fit; ``None`` if the policy drops."""
        if any(role == "text" for role, _ in messages):
            raise ValueError(
                "messages mix the role 'text' with turns, which no chat template can render"
            )
        starts = [0]
        if self.config.long_prompt == "truncate_left":
            starts += [i for i, (role, _) in enumerate(messages) if i and role == "user"]
        for first in starts:
            turns = [{"role": role, "content": text} for role, text in messages[first:]]
            ids = self.tokenizer.chat_ids(turns)
            if len(ids) <= room:
                return ids
        return None

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

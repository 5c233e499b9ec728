"""One training example as text, before any tokenizer."""

import dataclasses
from typing import Literal, get_args

from memdlm_jax.data.text import check_choice

Role = Literal["user", "assistant", "text"]
Message = tuple[Role, str]
ROLES: tuple[Role, ...] = get_args(Role)

TURN_TOKENS = 4
"""Special tokens of a row with one user turn: user, eos, assistant, eos."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and the response to it.

    Attributes:
        prompt: a plain string is one user turn; a tuple of (role, text) is a conversation, oldest
            turn first. Role ``text`` is bare text without any turn. The empty string is no prompt
            at all: the row is a piece of text for plain language modelling.
        response: what the model has to produce.
        group: what must stay together in one split, such as the conversation.
        source: where the example is from.
        prefix: start of the response that is given to the model (a prefill): it opens the
            response's turn, is never masked and carries no loss.
    """

    prompt: str | tuple[Message, ...]
    response: str
    group: str
    source: str
    prefix: str = ""

    def __post_init__(self):
        if not self.response:
            raise ValueError(f"response of an example of group {self.group!r} is empty")
        for role in {role for role, _ in self.messages}:
            check_choice("role", role, ROLES)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt as (role, text) pairs, oldest first; empty when there is no prompt."""
        if isinstance(self.prompt, str):
            return (("user", self.prompt),) if self.prompt else ()
        return self.prompt

"""The trajectory as the head reads it: one ``HeadState`` per inner step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.losses import HeadState
from memdlm_jax.memory.trajectory import State, Trajectory
from memdlm_jax.typing import (
    Denoiser,
    EnteringDenoiser,
    Hidden,
    Key,
    Mask,
    Theta,
    Tokens,
)


@dataclasses.dataclass(frozen=True)
class Reader:
    """How the inner loop reads a state before any fast weight does.

    Attributes:
        denoiser: the backbone.
        config: memory settings.
        theta: base parameters as the inner loop sees them.
        valid: [b, l] bool or ``None``.
        position_ids: [b, l] int32 or ``None``.
        groups: memories.
        entering: runs the first head layer up to its fast weights; ``None`` stops before it.
        hold: applied to what the inner loop reads.
    """

    denoiser: Denoiser
    config: MemoryConfig
    theta: Theta
    valid: Mask | None
    position_ids: Tokens | None
    groups: int
    entering: EnteringDenoiser | None = None
    hold: Callable[[Hidden], Hidden] = lambda hidden: hidden

    def trunk(self, tokens: Tokens, theta: Theta | None = None) -> Hidden:
        """The trunk's output [b, l, d] on some tokens."""
        split = fast_weights.split_of(self.denoiser, self.config)
        theta = self.theta if theta is None else theta
        return self.denoiser.trunk(theta, tokens, self.valid, self.position_ids, split=split)

    def enter(self, hidden: Hidden, state: State, theta: Theta | None = None) -> Hidden:
        """What the fast weights are the first to read, from the trunk's output on the state."""
        if self.entering is None:
            return hidden
        split = fast_weights.split_of(self.denoiser, self.config)
        theta = self.theta if theta is None else theta
        at = state.targets.positions
        return self.entering.enter(theta, hidden, at, self.valid, self.position_ids, split=split)

    def head_state(
        self, state: State, hidden: Hidden, teacher: Hidden | None = None, key: Key | None = None
    ) -> HeadState:
        """The state of all groups, leaves [groups, ...], from what ``enter`` returned."""
        entered = self.entering is not None
        read = HeadState(
            self.hold(hidden), self.valid, self.position_ids, state.targets, state.weight, teacher,
            entered=entered,
        )  # fmt: skip
        return fast_weights.group_rows(read, self.groups).replace(dropout_key=key)


def head_states(
    reader: Reader, trajectory: Trajectory, anchor: Hidden | None = None, start: int = 0
) -> list[HeadState]:
    """Run the trunk on every state once; one ``HeadState`` per inner step, leaves [groups, ...].

    Args:
        reader: runs it.
        trajectory: states, and what teachers read.
        anchor: what ``Reader.enter`` made of the anchor, if there is one to share.
        start: states of the first epoch that are left out.

    Raises:
        ValueError: a teacher reads the anchor and none is given.
    """
    shares = trajectory.ends_at_anchor and anchor is not None
    states = trajectory.states[start:]
    alone = states[: -1 if shares else None]
    hidden: list[Any] = [reader.enter(reader.trunk(state.tokens), state) for state in alone]
    hidden = hidden + [anchor] * shares
    teachers: list[Hidden | None] = [None] * len(hidden)
    if reader.config.distils:
        teachers = _teachers(reader, trajectory, hidden, anchor)
    order = range(len(states) * trajectory.epochs)
    keys = trajectory.dropout
    return [
        reader.head_state(
            states[k % len(states)], hidden[k % len(states)], teachers[k % len(states)],
            None if keys is None else keys[start + k],
        )
        for k in order
    ]  # fmt: skip


def _teachers(reader: Reader, trajectory: Trajectory, hidden, anchor) -> list[Hidden | None]:
    """Frozen hidden states of what the teacher of each state reads."""
    stop = jax.lax.stop_gradient
    after = anchor
    if trajectory.after is not None:
        after = reader.trunk(trajectory.after, stop(reader.theta))
    elif anchor is None:
        raise ValueError("trajectory.after=None is the anchor, but no anchor is given")
    order = trajectory.teachers or range(1, len(hidden) + 1)
    return [stop([*hidden, after][i]) for i in order]


def leading(
    reader: Reader, trajectory: Trajectory
) -> tuple[int, tuple[Any, Callable[[Any], HeadState]] | None]:
    """States that are walked under a scan, one trunk in memory at a time.

    They are those before the anchor's own, where there are several; not with teachers, who read
    the states behind theirs, nor where epochs read all states again.

    Returns:
        How many they are; and, unless there are none, the states stacked and the function that
        makes one of them a ``HeadState``, for ``inner_loop.adapt``. A derivative runs its trunk
        again instead of keeping what it computed, so that memory does not grow with the steps.
    """
    count = len(trajectory.states) - trajectory.ends_at_anchor
    if count < 2 or trajectory.epochs > 1 or reader.config.distils:
        return 0, None
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trajectory.states[:count])
    keys = None if trajectory.dropout is None else trajectory.dropout[:count]

    def hidden(state: State) -> Hidden:
        return reader.enter(reader.trunk(state.tokens), state)

    def read(entry) -> HeadState:
        state, key = entry
        return reader.head_state(state, jax.checkpoint(hidden, prevent_cse=False)(state), key=key)

    return count, ((stacked, keys), read)

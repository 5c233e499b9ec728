"""The denoising loop: blocks from left to right, each filled in a few steps.

``decode`` is the whole loop; a ``Loop`` has its parts, for those who want to look on or to do
something between two blocks. All are pure and made to be compiled.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from memdlm_jax.diffusion import reading, samplers, unmasking
from memdlm_jax.diffusion.canvas import Canvas
from memdlm_jax.diffusion.reading import Reader
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.typing import Cache, Key, Tokens


@flax.struct.dataclass
class State:
    """Where the loop is.

    Attributes:
        tokens: [b, l] int32, the canvas.
        commit_step: [b, w] int32, the row's step at which a token was committed or last edited;
            -1 where none was.
        confidence: [b, w] float32, probability of that token then.
        steps: [b] int32, steps taken with the row unfinished.
        settled: [b] bool, the row has nothing more to do in the current block.
        finished: [b] bool, the row has nothing more to do.
        editing: [b] int32, steps of this block after its last mask.
        block: number of the current block.
        step: steps taken in it.
        whole: passes over the whole canvas.
        parts: passes over a part of it, the rest cached.
        caches: one per reader, or none.
        history: [b, most steps + 1, w] int32, the window before the row's first step and after
            each, if wanted.
    """

    tokens: Tokens
    commit_step: Int[Array, "b w"]
    confidence: Float[Array, "b w"]
    steps: Int[Array, "b"]
    settled: Bool[Array, "b"]
    finished: Bool[Array, "b"]
    editing: Int[Array, "b"]
    block: Int[Array, ""]
    step: Int[Array, ""]
    whole: Int[Array, ""]
    parts: Int[Array, ""]
    caches: tuple[Cache, ...] = ()
    history: Int[Array, "b s w"] | None = None


@flax.struct.dataclass
class Decoded:
    """What was generated, and how.

    Attributes:
        tokens: [b, length] int32, free of mask tokens; behind the end of a row that stopped early
            stands its first ``stop`` token.
        commit_step: [b, length] int32, the step at which each token was committed, or last
            edited; -1 behind the end of a row that stopped early.
        confidence: [b, length] float32, probability of each token then.
        steps: [b] int32, denoising steps of each row.
        whole: int32, passes over the whole canvas; with guidance each is two.
        parts: int32, passes over a part of it, the rest cached; likewise.
        history: [b, most steps + 1, length] int32, before the row's first step and after each,
            masks included; zeros after its last step. ``None`` unless recorded.
    """

    tokens: Int[Array, "b l"]
    commit_step: Int[Array, "b l"]
    confidence: Float[Array, "b l"]
    steps: Int[Array, "b"]
    whole: Int[Array, ""]
    parts: Int[Array, ""]
    history: Int[Array, "b s l"] | None = None


def decode(loop: "Loop", *, record: bool = False) -> Decoded:
    """Fill the windows of a canvas; to be compiled, once per shape.

    Args:
        loop: canvas, model, sampler and keys.
        record: keep the window after every step.
    """
    return loop.finish(loop.run(loop.begin(record=record), loop.config.num_blocks))


@dataclasses.dataclass(frozen=True)
class Loop:
    """The denoising loop over one canvas: ``begin``, then ``step`` or ``run``, then ``finish``.

    Attributes:
        readers: the model; with guidance also the one that is not to see the prompt.
        keys: [b] one PRNG key per row.
        canvas: prompts and windows, see ``canvas.lay_out``.
        config: sampler settings.
        mask_token_id: id of the mask token.
    """

    readers: Sequence[Reader]
    keys: Key
    canvas: Canvas
    config: DecodeConfig
    mask_token_id: int

    def __post_init__(self):
        wanted = 1 + (self.config.guidance > 0)
        if len(self.readers) != wanted:
            raise ValueError(
                f"decode.guidance={self.config.guidance} takes {wanted} readers, "
                f"{len(self.readers)} were given"
            )

    def begin(self, *, record: bool = False) -> State:
        """The state before the first step; the model is not run."""
        canvas, config = self.canvas, self.config
        rows, width = canvas.fillable.shape
        windows = None
        if record:
            most = config.num_blocks * samplers.most_steps(config)
            windows = jnp.zeros((rows, most + 1, width), jnp.int32)
            windows = windows.at[:, 0].set(canvas.tokens[:, canvas.start :])
        zero, none = jnp.zeros((), jnp.int32), jnp.zeros(rows, bool)
        return State(
            tokens=canvas.tokens,
            commit_step=jnp.full((rows, width), -1, jnp.int32),
            confidence=jnp.zeros((rows, width), jnp.float32),
            steps=jnp.zeros(rows, jnp.int32), settled=none, finished=none,
            editing=jnp.zeros(rows, jnp.int32),
            block=zero, step=zero, whole=zero, parts=zero,
            caches=reading.empty_caches(self.readers, canvas, config), history=windows,
        )  # fmt: skip

    def run(self, state: State, until: int | Int[Array, ""]) -> State:
        """Take steps until block ``until`` begins or all rows are finished.

        Args:
            state: at the beginning of a block.
            until: number of a block.
        """

        def more(state):
            return (state.block < until) & ~jnp.all(state.finished)

        if self.config.cache == "none":
            return jax.lax.while_loop(more, self.step, state)

        # Two loops, and no choice in the inner one: passing the cache through a conditional would
        # copy it at every step.
        def inside(state):
            return (state.step > 0) & more(state)

        def whole_block(state):
            state = self.step(state, first=True)
            return jax.lax.while_loop(inside, lambda s: self.step(s, first=False), state)

        return jax.lax.while_loop(more, whole_block, state)

    def step(self, state: State, first: bool | None = None) -> State:
        """One denoising step: predict the current block, commit, perhaps edit, perhaps move on.

        A row waits for the others at the end of each block. What it gets does not depend on them:
        its noise is drawn by block and step in the block.

        Args:
            state: any but the last.
            first: whether it is a block's first step, if that is known beforehand.
        """
        config, size = self.config, self.config.block_size
        logits, state = self._read(state, first)
        proposal = unmasking.propose(self._step_keys(state), logits, config, self.mask_token_id)

        at = state.block * size
        block = jax.lax.dynamic_slice_in_dim(state.tokens, self.canvas.start + at, size, 1)
        fillable = jax.lax.dynamic_slice_in_dim(self.canvas.fillable, at, size, 1)
        active = ~(state.settled | state.finished)
        masked = fillable & (block == self.mask_token_id)
        plan = samplers.plan(config)
        now = jnp.minimum(state.step, len(plan.quota) - 1)
        quota, share = jnp.asarray(plan.quota)[now], jnp.asarray(plan.share)[now]
        commit = unmasking.choose(proposal, masked & active[:, None], config, quota, share)
        edit = jnp.zeros_like(commit)
        if config.editing_threshold is not None:
            edit = fillable & ~masked & active[:, None] & (proposal.tokens != block)
            edit &= proposal.probability > config.editing_threshold
        state = self._write(state, proposal, commit | edit, active)

        settled = ~jnp.any(masked & ~commit, axis=1)
        if config.editing_threshold is not None:
            had_masks, editing = jnp.any(masked, axis=1), state.editing
            editing += active & ~had_masks
            calm = ~had_masks & ~jnp.any(edit, axis=1)
            settled &= calm | (editing >= config.post_steps)
            state = dataclasses.replace(state, editing=editing)
        settled |= state.step + 1 >= samplers.most_steps(config)  # Whatever the logits are.
        state = dataclasses.replace(
            state, settled=state.settled | settled, steps=state.steps + active, step=state.step + 1
        )
        return self._move_on(state)

    def finish(self, state: State) -> Decoded:
        """The answers out of the canvas, each from where it begins."""
        columns = self.canvas.offset[:, None] + jnp.arange(self.config.length)

        def answer(window):
            return jnp.take_along_axis(window, columns, axis=1)

        tokens = answer(state.tokens[:, self.canvas.start :])
        if self.config.stop:
            tokens = jnp.where(tokens == self.mask_token_id, self.config.stop[0], tokens)
        windows = state.history
        if windows is not None:
            windows = jnp.take_along_axis(windows, columns[:, None], axis=2)
        return Decoded(
            tokens, answer(state.commit_step), answer(state.confidence), state.steps, state.whole,
            state.parts, windows,
        )  # fmt: skip

    def _step_keys(self, state: State) -> Key:
        fold = jax.random.fold_in
        return jax.vmap(lambda key: fold(fold(key, state.block), state.step))(self.keys)

    def _read(self, state: State, first: bool | None) -> tuple[Float[Array, "b c v"], State]:
        """Logits at the current block, guidance applied, and the state with caches renewed."""
        config = self.config
        caches = state.caches or (None,) * len(self.readers)
        here = state.tokens, state.block, state.step == 0 if first is None else first
        read = [
            reading.read_block(reader, self.canvas, config, *here, cache)
            for reader, cache in zip(self.readers, caches, strict=True)
        ]
        logits, caches = zip(*read, strict=True)
        part = reading.is_part(config, state.block, state.step)
        state = dataclasses.replace(state, whole=state.whole + ~part, parts=state.parts + part)
        if config.cache != "none":
            state = dataclasses.replace(state, caches=caches)
        if config.guidance == 0:
            return logits[0], state
        guided, free = logits
        return free + (config.guidance + 1) * (guided - free), state

    def _write(self, state: State, proposal: unmasking.Proposal, where, active) -> State:
        """Put the chosen proposals in canvas and records."""
        start, at = self.canvas.start, state.block * self.config.block_size

        def put(old, new, at):
            block = jax.lax.dynamic_slice_in_dim(old, at, new.shape[1], 1)
            block = jnp.where(where, new.astype(old.dtype), block)
            return jax.lax.dynamic_update_slice_in_dim(old, block, at, 1)

        steps = jnp.broadcast_to(state.steps[:, None], proposal.tokens.shape)
        tokens = put(state.tokens, proposal.tokens, start + at)
        windows = state.history
        if windows is not None:
            record = jax.vmap(lambda old, new, i: old.at[i].set(new))
            windows = record(windows, tokens[:, start:], state.steps + active)
        return dataclasses.replace(
            state,
            tokens=tokens,
            commit_step=put(state.commit_step, steps, at),
            confidence=put(state.confidence, proposal.probability, at),
            history=windows,
        )

    def _move_on(self, state: State) -> State:
        """Go to the next block once all rows are through with this one."""
        window, fillable = state.tokens[:, self.canvas.start :], self.canvas.fillable
        finished = ~jnp.any(fillable & (window == self.mask_token_id), axis=1)
        if self.config.stop:
            ends = fillable & jnp.isin(window, jnp.array(self.config.stop))
            finished |= jnp.any(ends, axis=1)
        finished = state.finished | (finished & state.settled)
        done = jnp.all(state.settled | finished)
        return dataclasses.replace(
            state,
            finished=finished,
            block=state.block + done,
            step=jnp.where(done, 0, state.step),
            settled=state.settled & ~done,
            editing=jnp.where(done, 0, state.editing),
        )


def history(decoded: Decoded, mask_token_id: int) -> Int[np.ndarray, "s b l"]:
    """The answer before the first step and after each one; [steps + 1, b, length] int32.

    Where it was not recorded it is rebuilt from the commits; edits show their last token only.
    """
    tokens, commit_step = np.asarray(decoded.tokens), np.asarray(decoded.commit_step)
    steps = np.arange(int(np.max(decoded.steps)) + 1)[:, None]
    if decoded.history is not None:
        reached = np.minimum(steps, decoded.steps)
        return np.asarray(decoded.history)[np.arange(len(tokens)), reached]
    committed = (commit_step < steps[..., None]) & (commit_step >= 0)
    return np.where(committed, tokens, np.int32(mask_token_id))

"""Masked diffusion language modelling: corrupt rows, and take the MDLM loss on them.

``draw_anchor`` draws the corrupted rows x_t, ``mdlm_loss`` is the loss of the plain model on them
(paper, equation 2), and ``state_loss`` is that loss from last hidden states, which memory shares.
Logits exist at the target positions only.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from memdlm_jax import partitioning
from memdlm_jax.diffusion import masking
from memdlm_jax.diffusion.schedule import Schedule
from memdlm_jax.typing import (
    Batch,
    Context,
    Denoiser,
    EfficientDenoiser,
    Hidden,
    Key,
    Mask,
    Phi,
    Theta,
    Tokens,
)

Corruption = Callable[[Key, Batch], tuple[Mask, Float[Array, "b"]]]
"""(key, batch) -> (mask [b, l] within ``maskable``, loss weight [b]): a forward process."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How the outer loss weighs and averages.

    Attributes:
        weighting: of the rows: ``scheduler``, w(t), or ``uniform``.
        normalisation: divide the batch's sum by its maskable tokens (``token``, the paper) or by
            its rows (``batch``), or each row's by its maskable tokens, then by the rows
            (``sequence``). Rows without a maskable token do not count.
        padding: supervised padding (``Batch.padding``) is masked and learnt like a response
            (``masked``), or stays visible and carries no loss (``visible``).
    """

    weighting: Literal["scheduler", "uniform"] = "scheduler"
    normalisation: Literal["token", "sequence", "batch"] = "token"
    padding: Literal["masked", "visible"] = "masked"

    def __post_init__(self):
        choices = {
            "weighting": ("scheduler", "uniform"),
            "normalisation": ("token", "sequence", "batch"),
            "padding": ("masked", "visible"),
        }
        for field, known in choices.items():
            if getattr(self, field) not in known:
                listed = ", ".join(map(repr, known))
                raise ValueError(f"loss.{field}={getattr(self, field)!r} must be one of {listed}")

    def supervised(self, batch: Batch) -> Batch:
        """The batch as the loss sees it; see ``padding``."""
        return batch if self.padding == "masked" else without_padding(batch)

    def row_weights(self, weight: Float[Array, "b"], batch: Batch) -> Float[Array, "b"]:
        """Turn the schedule's weights into those of the rows' summed losses."""
        if self.weighting == "uniform":
            weight = jnp.ones_like(weight)
        if self.normalisation == "sequence":
            # As wide as enabled: float64 parity would be lost in a float32 quotient.
            weight = weight.astype(jnp.result_type(float))
            weight = weight / jnp.maximum(batch.maskable.sum(-1), 1)
        return weight

    def normaliser(self, maskable: Int[Array, ""], rows: Int[Array, ""]) -> Int[Array, ""]:
        """What the weighted sum is divided by: maskable tokens, or the rows that have one."""
        return maskable if self.normalisation == "token" else rows


PAPER_LOSS = LossConfig()


@flax.struct.dataclass
class Targets:
    """The supervised positions of every row, gathered into ``c`` slots.

    Attributes:
        positions: [b, c] int32 index into the row.
        labels: [b, c] int32 clean token at that position.
        present: [b, c] bool, False for slots that hold no target.
        weight: [b, c] weight of each target's loss; ``None`` is 1 for all.
    """

    positions: Int[Array, "b c"]
    labels: Int[Array, "b c"]
    present: Bool[Array, "b c"]
    weight: Float[Array, "b c"] | None = None


@flax.struct.dataclass
class NoisyState:
    """One noisy state of every row, with the targets to predict on it.

    Attributes:
        tokens: [b, l] int32, with mask tokens in it.
        targets: clean tokens at the supervised positions.
        weight: [b] weight of each row's summed loss. Inner losses carry their normaliser in it.
    """

    tokens: Tokens
    targets: Targets
    weight: Float[Array, "b"]


@flax.struct.dataclass
class Anchor:
    """The rows of the outer loss: x_t, its targets and their surroundings.

    Attributes:
        state: x_t, all its masked positions as targets, and the weights of the rows.
        context: who may be attended to.
        maskable: [b] int32, maskable tokens of every row.
        mask: [b, l] bool, the masked positions.
        weight: [b] w(t) of every row, before ``LossConfig.row_weights``.
    """

    state: NoisyState
    context: Context
    maskable: Int[Array, "b"]
    mask: Mask
    weight: Float[Array, "b"]


def without_padding(batch: Batch) -> Batch:
    """The batch with its supervised padding visible to all and learnt by none."""
    if batch.padding is None:
        return batch
    return dataclasses.replace(batch, maskable=batch.maskable & ~batch.padding)


def draw_anchor(
    key: Key,
    batch: Batch,
    mask_token_id: int,
    corruption: Schedule | Corruption,
    loss: LossConfig = PAPER_LOSS,
    capacity: int | None = None,
) -> Anchor:
    """Corrupt the rows for the outer loss (paper, section 2).

    Args:
        key: PRNG key.
        batch: clean rows.
        mask_token_id: id of the mask token.
        corruption: a schedule: every row draws a time t, every maskable token is masked with
            probability ``mask_ratio(t)``; or any other forward process.
        loss: how the rows are weighed.
        capacity: target slots of a row, see ``gather_targets``.
    """
    if isinstance(corruption, Schedule):
        time_key, mask_key = jax.random.split(key)
        t = corruption.sample_times(time_key, batch.tokens.shape[0])
        mask = masking.bernoulli_mask(mask_key, batch.maskable, corruption.mask_ratio(t))
        weight = corruption.weight(t)
    else:
        mask, weight = corruption(key, batch)
    tokens = masking.apply_mask(batch.tokens, mask, mask_token_id)
    targets = gather_targets(batch.tokens, mask, capacity)
    state = NoisyState(tokens, targets, loss.row_weights(weight, batch))
    return Anchor(state, Context(batch.valid), batch.maskable.sum(-1), mask, weight)


@dataclasses.dataclass(frozen=True)
class WholeAnswers:
    """Forward process that masks answers about a text whole; other rows as the schedule has it.

    Attributes:
        schedule: of rows without a text.
        least: smallest share of an answer that is masked, in (0, 1]. 1 suits answers of one token;
            less also trains the steps in which a part of a longer answer is known.
    """

    schedule: Schedule
    least: float = 1.0

    def __post_init__(self):
        if not 0 < self.least <= 1:
            raise ValueError(f"least={self.least} must be in (0, 1]")

    def __call__(self, key: Key, batch: Batch) -> tuple[Mask, jax.Array]:
        """(mask [b, l], loss weight [b]); see ``Corruption``."""
        time_key, mask_key = jax.random.split(key)
        rows = len(batch.tokens)
        t = self.schedule.sample_times(time_key, rows)
        if batch.context is not None:
            written = jnp.any(batch.context.valid, axis=(1, 2))
            asked = jnp.repeat(written, rows // len(written))
            t = jnp.where(asked, self.least + (1 - self.least) * t, t)
        mask = masking.bernoulli_mask(mask_key, batch.maskable, self.schedule.mask_ratio(t))
        return mask, self.schedule.weight(t)


def mdlm_loss(denoiser: Denoiser, theta: Theta, anchor: Anchor) -> Float[Array, ""]:
    """The MDLM loss of the plain model (paper, equation 2): a weighted sum, not yet normalised.

    Returns:
        Sum over rows and targets of w(t) * -log p(x_0 | x_t), in nats. The mean per token divides
        it by the *maskable* tokens of the whole batch, masked or not.
    """
    split, at = plain_split(denoiser), anchor.state.targets.positions
    hidden = denoiser.trunk(theta, anchor.state.tokens, anchor.context, split=split)
    last = head_at(denoiser, theta, None, hidden, at, anchor.context, split=split)
    return state_loss(denoiser, theta, last, anchor.state)


def state_loss(
    denoiser: Denoiser, theta: Theta, last_hidden: Float[Array, "b c d"], state: NoisyState
) -> Float[Array, ""]:
    """Weighted sum of -log p over the targets of a state, from the last hidden states there."""
    losses = label_losses(denoiser, theta, last_hidden, state.targets)
    return weighted_sum(losses, state.targets, state.weight)


def plain_split(denoiser: Denoiser) -> int:
    """Trunk layers of a model without memory: all but the last, which ``head_at`` cuts short."""
    return denoiser.num_layers - 1


def head_at(
    denoiser: Denoiser,
    theta: Theta,
    phi: Phi,
    hidden: Hidden,
    at: Int[Array, "b c"],
    context: Context,
    *,
    split: int,
    entered: bool = False,
) -> Float[Array, "b c d"]:
    """Last hidden states [b, c, d] at positions ``at`` alone, before the final norm.

    An ``EfficientDenoiser`` runs its last layer at these positions only; any other runs it
    everywhere. With ``entered``, ``hidden`` is what ``EfficientDenoiser.enter`` returned.
    """
    if isinstance(denoiser, EfficientDenoiser):
        return denoiser.head_at(theta, phi, hidden, at, context, split=split, entered=entered)
    if entered:
        raise TypeError(f"entered=True, but {type(denoiser).__name__} is no EfficientDenoiser")
    last = denoiser.head(theta, phi, hidden, context, split=split)
    return jnp.take_along_axis(last, at[..., None], axis=1)


def gather_targets(tokens: Tokens, mask: Mask, capacity: int | None = None) -> Targets:
    """List the masked positions of every row in order, in ``capacity`` static slots.

    Args:
        tokens: [b, l] int32 clean tokens.
        mask: [b, l] bool, True at the positions to supervise.
        capacity: slots c of a row; ``None`` means l. The caller guarantees that no row has more
            targets (the data pipeline checks it on the host): slots beyond it would be lost.

    Returns:
        ``Targets`` with ``c = min(capacity, l)``.
    """
    length = tokens.shape[1]
    capacity = length if capacity is None else min(capacity, length)
    order = jnp.argsort(~mask, axis=-1, stable=True)[:, :capacity].astype(jnp.int32)
    return Targets(
        positions=order,
        labels=jnp.take_along_axis(tokens, order, axis=1),
        present=jnp.take_along_axis(mask, order, axis=1),
    )


def weighted_sum(
    losses: Float[Array, "b c"], targets: Targets, weight: Float[Array, "b"]
) -> Float[Array, ""]:
    """Sum of per-target losses over the slots that hold a target, times the weights of both."""
    if targets.weight is not None:
        losses = losses * targets.weight
    rows = jnp.sum(jnp.where(targets.present, losses, 0.0), axis=-1)
    return jnp.sum(rows * weight.astype(rows.dtype))


def token_losses(logits: Float[Array, "b c v"], targets: Targets) -> Float[Array, "b c"]:
    """-log p(label) of every slot, in nats; meaningless where the slot holds no target."""
    picked = jnp.take_along_axis(logits, targets.labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def chunked_token_losses(
    normalised: Float[Array, "b c d"],
    unembedding: Float[Array, "d v"],
    targets: Targets,
    chunk: int,
) -> Float[Array, "b c"]:
    """``token_losses`` of ``normalised @ unembedding``, at most ``chunk`` logits of a slot at once.

    The logits of a chunk are made again in the backward pass, so that [b, c, v] never stands in
    memory; that is one more product with the unembedding than without chunks. Derivatives of any
    order go through. Where the mesh in context divides the vocabulary, each device goes through
    the chunks of its own share, and the sums of all shares meet once, at the end.

    Args:
        normalised: hidden states of the slots, behind the final norm.
        unembedding: output matrix.
        targets: labels of the slots.
        chunk: tokens of the vocabulary, or of a share of it, at a time, at least 1.
    """
    wide = jnp.promote_types(normalised.dtype, jnp.float32)
    kernel = _shares(unembedding.astype(normalised.dtype), partitioning.parts_of("vocab"))
    size, (_, shares, share) = unembedding.shape[1], kernel.shape
    chunk = min(chunk, share)

    @jax.checkpoint
    def add(carry, columns, at):
        """Of every share: its highest logit so far, the exponentials below, the label's logit."""
        highest, total, picked = carry
        here = jnp.einsum("bcd,dsk->bcsk", normalised, columns, preferred_element_type=wide)
        here = partitioning.constrain(here, "rows", None, "vocab", None)
        token = jnp.arange(shares)[:, None] * share + at + jnp.arange(columns.shape[2])
        if shares * share > size:  # A finite number: a share may have no token at all.
            here = jnp.where(token < size, here, jnp.finfo(wide).min)
        own = token == targets.labels[..., None, None]
        picked = picked + jnp.sum(jnp.where(own, here, 0), axis=-1)
        # A constant of the derivative: it cancels from the result.
        new = jnp.maximum(highest, jax.lax.stop_gradient(jnp.max(here, axis=-1)))
        total = total * jnp.exp(highest - new) + jnp.sum(jnp.exp(here - new[..., None]), axis=-1)
        return new, total, picked

    def step(carry, at):
        return add(carry, jax.lax.dynamic_slice_in_dim(kernel, at, chunk, 2), at), None

    slots = (*normalised.shape[:-1], shares)
    carry = jnp.full(slots, -jnp.inf, wide), jnp.zeros(slots, wide), jnp.zeros(slots, wide)
    carry, _ = jax.lax.scan(step, carry, jnp.arange(share // chunk) * chunk)
    if rest := share % chunk:
        carry = add(carry, kernel[..., share - rest :], share - rest)
    highest, total, picked = carry
    most = jax.lax.stop_gradient(jnp.max(highest, axis=-1))
    total = jnp.sum(total * jnp.exp(highest - most[..., None]), axis=-1)
    return most + jnp.log(total) - jnp.sum(picked, axis=-1)


def _shares(kernel: Float[Array, "d v"], shares: int) -> Float[Array, "d s w"]:
    """Columns in so many shares of equal width, the last ones filled up with zeros.

    The width of the model is left to lie as it does: each chunk is gathered when its turn comes.
    """
    share = -(-kernel.shape[1] // shares)
    kernel = jnp.pad(kernel, ((0, 0), (0, shares * share - kernel.shape[1])))
    return partitioning.constrain(kernel.reshape(-1, shares, share), "any", "vocab", None)


def label_losses(
    denoiser: Denoiser, theta: Theta, last_hidden: Float[Array, "b c d"], targets: Targets
) -> Float[Array, "b c"]:
    """-log p(label) of every slot from its last hidden state, in nats.

    By chunks of the vocabulary where the denoiser says so (``EfficientDenoiser.vocab_chunk``).
    """
    if isinstance(denoiser, EfficientDenoiser) and denoiser.vocab_chunk:
        normalised, kernel = denoiser.normalise(theta, last_hidden), denoiser.unembedding(theta)
        return chunked_token_losses(normalised, kernel, targets, denoiser.vocab_chunk)
    return token_losses(denoiser.readout(theta, last_hidden), targets)


def row_losses(logits: Float[Array, "b c v"], targets: Targets) -> Float[Array, "b"]:
    """Sum of -log p(label) over each row's targets, in nats; zero for a row without any."""
    return jnp.sum(jnp.where(targets.present, token_losses(logits, targets), 0.0), axis=-1)

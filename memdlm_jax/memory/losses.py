"""Inner losses: what one inner step asks of the fast weights (paper, section 4.2 and ablations).

Each is a function ``(theta, phi, state) -> scalar`` of one group: the weighted sum over its
targets, in nats for ``ce`` and the two KL divergences. The normaliser stands in ``state.weight``.
Any function of that form can take its place.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memdlm_jax.diffusion import objective
from memdlm_jax.diffusion.objective import Targets
from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.typing import Denoiser, Hidden, Key, Mask, Phi, Theta, Tokens

InnerLoss = Callable[[Theta, Phi, Any], jax.Array]
"""Loss of one group: (theta, phi without group axis, the group's state) -> scalar."""


@flax.struct.dataclass
class HeadState:
    """One state of the inner loop as the head reads it.

    Attributes:
        hidden: [b, l, d] output of the trunk on the state's tokens; or, where ``entered``, what
            ``typing.EnteringDenoiser.enter`` made of it, [b, l, d] or at the targets [b, c, d].
        valid: [b, l] bool, or ``None``.
        position_ids: [b, l] int32, or ``None`` for 0 .. l-1.
        targets: clean tokens at the supervised positions.
        weight: [b] weight of each row's summed loss, the normaliser included.
        teacher: [b, l, d] output of the trunk on what a distillation teacher reads, or ``None``.
        dropout_key: of the inputs' dropout, or ``None``.
        entered: see ``hidden``; only the losses of this module are given such states.
    """

    hidden: Hidden
    valid: Mask | None
    position_ids: Tokens | None
    targets: Targets
    weight: Float[Array, "b"]
    teacher: Hidden | None = None
    dropout_key: Key | None = None
    entered: bool = flax.struct.field(pytree_node=False, default=False)


def build(denoiser: Denoiser, config: MemoryConfig) -> InnerLoss:
    """The inner loss that the config names, of one group's ``HeadState``."""
    split = fast_weights.split_of(denoiser, config)
    distance = _DISTANCES[_name(config)]

    def loss(theta: Theta, phi: Phi, state: HeadState) -> jax.Array:
        used = phi
        if state.dropout_key is not None:
            used = fast_weights.with_dropout(phi, state.dropout_key, config.dropout)
        student = last_hidden(denoiser, theta, used, state.hidden, state, split)
        teacher = None
        if config.distils:
            # A teacher is frozen by definition: it has no derivative of any order.
            frozen, memory, hidden = jax.lax.stop_gradient((theta, phi, state.teacher))
            teacher = last_hidden(denoiser, frozen, memory, hidden, state, split)
        losses = distance(denoiser, config, theta, student, teacher, state.targets)
        return objective.weighted_sum(losses, state.targets, state.weight)

    return loss


def last_hidden(
    denoiser: Denoiser, theta: Theta, phi: Phi, hidden: Any, state: HeadState, split: int
) -> Float[Array, "b c d"]:
    """Last hidden states at the targets, before the final norm."""
    return fast_weights.head_at(
        denoiser, theta, phi, hidden, state.targets.positions, state.valid, state.position_ids,
        split=split, entered=state.entered,
    )  # fmt: skip


def _name(config: MemoryConfig) -> str:
    return config.hidden_distance if config.loss == "distill_hidden" else config.loss


def _cross_entropy(denoiser, config, theta, student, teacher, targets) -> Float[Array, "b c"]:
    del config, teacher
    return objective.label_losses(denoiser, theta, student, targets)


def _to_student(denoiser, config, theta, student, teacher, targets) -> Float[Array, "b c"]:
    """KL(teacher || student)."""
    del targets
    log_student, log_teacher = _log_probabilities(denoiser, config, theta, student, teacher)
    return _kl_divergence(log_teacher, log_student)


def _to_teacher(denoiser, config, theta, student, teacher, targets) -> Float[Array, "b c"]:
    """KL(student || teacher)."""
    del targets
    log_student, log_teacher = _log_probabilities(denoiser, config, theta, student, teacher)
    return _kl_divergence(log_student, log_teacher)


def _log_probabilities(denoiser, config, theta, student, teacher):
    frozen = jax.lax.stop_gradient(theta)
    logits = denoiser.readout(theta, student), denoiser.readout(frozen, teacher)
    return [jax.nn.log_softmax(x / config.temperature, axis=-1) for x in logits]


def _kl_divergence(log_p, log_q) -> Float[Array, "b c"]:
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _mean_square(denoiser, config, theta, student, teacher, targets) -> Float[Array, "b c"]:
    """The public code compares the student before the final norm with the teacher after it."""
    del config, targets
    after = denoiser.normalise(jax.lax.stop_gradient(theta), teacher)
    return jnp.mean((student - after) ** 2, axis=-1)


def _cosine(denoiser, config, theta, student, teacher, targets) -> Float[Array, "b c"]:
    """One minus the cosine; the final norm as in ``_mean_square``."""
    del config, targets
    after = denoiser.normalise(jax.lax.stop_gradient(theta), teacher)
    return 1 - jnp.sum(_unit(student) * _unit(after), axis=-1)


def _unit(x: jax.Array) -> jax.Array:
    """Each last axis over its norm, which is at least 1e-12."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-24))


_DISTANCES = {
    "ce": _cross_entropy,
    "distill": _to_student,
    "distill_reverse": _to_teacher,
    "mse": _mean_square,
    "cosine": _cosine,
}

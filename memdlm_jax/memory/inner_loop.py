"""The inner loop: gradient steps on fast weights along a trajectory.

``InnerLoop`` holds everything that decides how memory is written: the denoiser, the settings, and
through them the masking strategy, the inner loss and the inner optimiser. Training, validation,
decoding and evaluation all receive this object. Its learned parts are one pytree,
``InnerParameters``, trained along with theta.

    inner_loop = InnerLoop(denoiser, MemoryConfig(loss="ce", optimizer="sgd"))
    phi = inner_loop.start(key, groups)
    phi, record = inner_loop.adapt(theta, learned, phi, trajectory, rule)

A new inner loss or inner optimiser is one function with one line in its table (``INNER_LOSSES``,
``INNER_OPTIMIZERS``); a config then names it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from memdlm_jax import partitioning
from memdlm_jax.diffusion import objective
from memdlm_jax.diffusion.objective import Anchor, NoisyState, Targets
from memdlm_jax.diffusion.schedule import Schedule
from memdlm_jax.memory import fast_weights
from memdlm_jax.memory import trajectory as trajectories
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.fast_weights import Dense, LowRank
from memdlm_jax.memory.trajectory import Trajectory
from memdlm_jax.registry import INNER_LOSSES, INNER_OPTIMIZERS
from memdlm_jax.typing import Batch, Context, Denoiser, Hidden, Key, Phi, Theta

GroupLoss = Callable[[Theta, Phi, Any], jax.Array]
"""Loss of one group: (theta, phi without group axis, the group's state) -> scalar."""

InnerGradient = Callable[[Theta, Phi, Any], tuple[jax.Array, Phi]]
"""(theta, phi [g, ...], state [g, ...]) -> (losses [g], gradient like phi)."""

Measure = Callable[[Theta, Phi, Any], jax.Array]
"""(theta, phi [g, ...], state [g, ...]) -> losses [g]."""


class Rule(Protocol):
    """What the inner loop's inputs are to a derivative; see ``memory.meta_gradient``.

    Attributes:
        axis_name: device axis over which one memory is shared, if any.
        shares_attention: the attention of the first head layer has the same gradient as the trunk,
            so that what is computed before phi is read may be shared; see ``InnerLoop.enters``.
    """

    shares_attention: bool

    @property
    def axis_name(self) -> str | None:
        """Device axis, see the class."""
        ...

    def inner_theta(self, theta: Theta) -> Theta:
        """Theta as the inner loop sees it."""
        ...

    def inner_hidden(self, hidden: Hidden) -> Hidden:
        """Hidden states as the inner loop sees them."""
        ...

    def gradient(self, loss: GroupLoss) -> InnerGradient:
        """The gradient of the inner loss in phi."""
        ...


@flax.struct.dataclass
class InnerParameters:
    """The learned parts of the inner loop, trained along with theta (``MemoryConfig.learned``).

    Beyond the paper: a learning rate per matrix and layer as in Meta-SGD (arXiv 1707.09835), and
    the start as in MAML (arXiv 1703.03400). With ``first_order`` the inner gradients are constants:
    a rate then gets -<outer gradient, clipped inner gradient>, the start the outer gradient at
    phi_K.

    Attributes:
        log_rates: phi's structure with a leaf [layers] for every matrix: the logarithm of its
            inner learning rate in each adapted layer; ``None`` keeps ``learning_rate``.
        start: path -> [layers, in, rank], A of phi_0 (B stays zero, so that phi_0 leaves the
            model unchanged), or [layers, in, out] for dense fast weights; ``None`` draws phi_0.
    """

    log_rates: Phi = None
    start: dict[str, jax.Array] | None = None


@flax.struct.dataclass
class WithInner:
    """All that the outer gradient trains when the inner loop has learned parts."""

    theta: Theta
    inner: InnerParameters


def join_learned(theta: Theta, learned: InnerParameters | None) -> Any:
    """The parameters to train: theta alone unless the inner loop has learned parts."""
    return theta if learned is None else WithInner(theta, learned)


def split_learned(parameters: Any) -> tuple[Theta, InnerParameters | None]:
    """Inverse of ``join_learned``."""
    if isinstance(parameters, WithInner):
        return parameters.theta, parameters.inner
    return parameters, None


@flax.struct.dataclass
class InnerStep:
    """Record of inner steps; leading axes [steps, groups].

    Attributes:
        loss: inner loss before the step, nats per supervised token (times its weight).
        loss_after: the same loss on the same state after the step; NaN where not measured.
        gradient_norm: norm of the whole gradient before clipping.
        skipped: the step was left out because loss or gradient was not finite.
    """

    loss: Float[Array, "k g"]
    loss_after: Float[Array, "k g"]
    gradient_norm: Float[Array, "k g"]
    skipped: Bool[Array, "k g"]


@flax.struct.dataclass
class HeadState:
    """One state of the trajectory as the head reads it.

    Attributes:
        hidden: [b, l, d] output of the trunk on the state's tokens; or, where ``entered``, what
            ``EfficientDenoiser.enter`` returned for it, [b, l, d] or at the targets [b, c, d].
        context: of the rows.
        targets: clean tokens at the supervised positions.
        weight: [b] weight of each row's summed loss, the normaliser included.
        teacher: [b, l, d] output of the trunk on what a distillation teacher reads, or ``None``.
        dropout_key: of the inputs' dropout, or ``None``.
        entered: see ``hidden``.
    """

    hidden: Hidden
    context: Context
    targets: Targets
    weight: Float[Array, "b"]
    teacher: Hidden | None = None
    dropout_key: Key | None = None
    entered: bool = flax.struct.field(pytree_node=False, default=False)


@dataclasses.dataclass(frozen=True)
class InnerLoop:
    """How memory is written: denoiser and settings, which name loss, optimiser and strategy.

    Attributes:
        denoiser: the backbone.
        config: memory settings.
    """

    denoiser: Denoiser
    config: MemoryConfig

    @property
    def split(self) -> int:
        """Number of trunk layers."""
        return fast_weights.split_of(self.denoiser, self.config)

    def init_learned(self, key: Key) -> InnerParameters | None:
        """Learned parts at the start of training, equal to the fixed inner loop; float32.

        Rates start at ``learning_rate``, the start at one draw of phi_0. ``None`` if the config
        learns no part.
        """
        config = self.config
        if not config.learned:
            return None
        phi = fast_weights.init(key, self.denoiser, config, groups=1)
        phi = jax.tree.map(lambda leaf: leaf[0], phi)
        log_rates, start = None, None
        if "rates" in config.learned:
            rate = math.log(config.learning_rate)
            log_rates = jax.tree.map(lambda leaf: jnp.full(leaf.shape[:1], rate, leaf.dtype), phi)
        if "start" in config.learned:
            found = fast_weights.by_path(phi)
            start = {path: _starting_matrix(delta) for path, delta in found.items()}
        return InnerParameters(log_rates, start)

    def start(self, key: Key, groups: int, learned: InnerParameters | None = None) -> Phi:
        """Phi_0 of so many groups; it leaves the model unchanged. See ``fast_weights.init``."""
        phi = fast_weights.init(key, self.denoiser, self.config, groups)
        if learned is None or learned.start is None:
            return phi
        start = learned.start

        def replace(path, delta):
            name = jax.tree_util.keystr(path[:-1], simple=True, separator="/")
            leaf = jnp.broadcast_to(start[name], _starting_matrix(delta).shape)
            return delta.replace(A=leaf) if isinstance(delta, LowRank) else delta.replace(W=leaf)

        return jax.tree_util.tree_map_with_path(replace, phi, is_leaf=fast_weights.is_fast_weight)

    def draw(
        self,
        keys: tuple[Key, Key, Key | None],
        batch: Batch,
        anchor: Anchor,
        schedule: Schedule,
        learned: InnerParameters | None = None,
        parts: int = 1,
        axis_name: str | None = None,
    ) -> tuple[Phi, Trajectory]:
        """Draw phi_0 and the trajectory to an anchor: the paper writes the rows that are scored.

        Args:
            keys: PRNG keys of phi_0, of the masks and of the inputs' dropout (``None`` drops
                nothing). Under ``pmap`` the first must be the same on all devices for a ``global``
                memory, the others must differ.
            batch: clean rows.
            anchor: of the outer loss on these rows.
            schedule: weighs the states of the trajectory.
            learned: learned parts of the inner loop.
            parts: equal parts of a step's whole batch (devices times micro-batches), one of which
                is ``batch``.
            axis_name: device axis, if any.

        Raises:
            ValueError: the rows cannot be divided evenly among the config's memories.
        """
        phi_key, mask_key, dropout_key = keys
        config, mask_token_id = self.config, self.denoiser.mask_token_id
        groups = fast_weights.groups_for(config, batch.tokens.shape[0], parts)
        rows = trajectories.rows_of_anchor(batch, anchor, config, mask_token_id, schedule)
        trajectory = trajectories.draw(
            mask_key,
            config,
            rows,
            groups,
            capacity=anchor.state.targets.positions.shape[1],
            axis_name=axis_name if config.scope == "global" else None,
            dropout_key=dropout_key,
        )
        return self.start(phi_key, groups, learned), trajectory

    def optimizer(self, learned: InnerParameters | None = None) -> optax.GradientTransformation:
        """The inner optimiser of one group, with learned or fixed rates."""
        rates = None
        if learned is not None and learned.log_rates is not None:
            rates = jax.tree.map(jnp.exp, learned.log_rates)
        return INNER_OPTIMIZERS(self.config.optimizer)(self.config, rates)

    def enters(self, rule: Rule) -> bool:
        """Whether states share the first head layer up to its first fast weight with the anchor.

        They do not where that layer's attention has another gradient than the trunk, nor where a
        teacher reads its input.
        """
        if self.config.distils or not rule.shares_attention:
            return False
        return fast_weights.can_enter(self.denoiser, self.config)

    def read(self, theta: Theta, state: NoisyState, context: Context, entered: bool) -> Hidden:
        """Everything that is computed on a state before phi is read.

        The trunk's output [b, l, d]; with ``entered`` what ``EfficientDenoiser.enter`` makes of it.
        """
        hidden = self.denoiser.trunk(theta, state.tokens, context, split=self.split)
        if not entered:
            return hidden
        at = state.targets.positions
        denoiser: Any = self.denoiser
        return denoiser.enter(theta, hidden, at, context, split=self.split)

    def group_loss(self, theta: Theta, phi: Phi, state: HeadState) -> jax.Array:
        """Inner loss of one group: a weighted sum over its targets.

        Args:
            theta: base parameters.
            phi: fast weights of the group, leaves [layers, ...].
            state: rows of the group.

        Raises:
            ValueError: the loss that the config names returns another shape than [b, c].
        """
        used = phi
        if state.dropout_key is not None:
            used = fast_weights.with_dropout(phi, state.dropout_key, self.config.dropout)
        student, teacher = self._last_hidden(theta, used, state.hidden, state), None
        if self.config.distils:
            # A teacher is frozen by definition: it has no derivative of any order.
            frozen = jax.lax.stop_gradient((theta, phi, state.teacher))
            teacher = self._last_hidden(*frozen, state)
        token_losses = INNER_LOSSES(self.config.loss)
        losses = token_losses(self.denoiser, self.config, theta, student, teacher, state.targets)
        if losses.shape != state.targets.labels.shape:
            raise ValueError(
                f"memory.loss={self.config.loss!r} returned shape {losses.shape}; it must return "
                f"one loss per target slot, {state.targets.labels.shape}"
            )
        return objective.weighted_sum(losses, state.targets, state.weight)

    def _last_hidden(self, theta: Theta, phi: Phi, hidden: Any, state: HeadState) -> jax.Array:
        """Last hidden states at the targets [b, c, d], before the final norm."""
        return objective.head_at(
            self.denoiser, theta, phi, hidden, state.targets.positions, state.context,
            split=self.split, entered=state.entered,
        )  # fmt: skip

    def adapt(
        self,
        theta: Theta,
        learned: InnerParameters | None,
        phi: Phi,
        trajectory: Trajectory,
        rule: Rule,
        anchor: Hidden | None = None,
        measure: bool | jax.Array = False,
    ) -> tuple[Phi, InnerStep]:
        """Write the trajectory into phi, one optimiser step per state (paper, equations 5 to 8).

        Args:
            theta: base parameters.
            learned: learned parts of the inner loop, or ``None``.
            phi: where to start, leaves [groups, ...].
            trajectory: what to learn from; its rows are divided among the groups.
            rule: what a derivative of the result sees; see ``memory.meta_gradient``.
            anchor: what ``read`` returned for the anchor, where the trajectory ends at it.
            measure: also compute every step's loss after the step.

        Returns:
            (adapted phi, record of the inner steps).

        Raises:
            ValueError: a teacher reads the anchor, and none is given.
        """
        groups = fast_weights.number_of_groups(phi)
        reader = _Reader(self, rule.inner_theta(theta), trajectory, groups, rule)
        count, leading = reader.leading()
        return fold(
            rule.gradient(self.group_loss),
            reader.theta,
            phi,
            reader.states(anchor, count),
            self.optimizer(learned),
            _measured(self.group_loss, measure, rule.axis_name),
            leading,
        )


def inner_loop_for(denoiser: Denoiser, config: MemoryConfig | None) -> InnerLoop | None:
    """The inner loop of these settings, or ``None`` without settings."""
    return None if config is None else InnerLoop(denoiser, config)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Runs the trunk on the states of a trajectory, each once.

    Attributes:
        loop: the inner loop.
        theta: as the inner loop sees it.
        trajectory: the states.
        groups: memories that share out the rows.
        rule: see ``InnerLoop.adapt``.
    """

    loop: InnerLoop
    theta: Theta
    trajectory: Trajectory
    groups: int
    rule: Rule

    def leading(self) -> tuple[int, tuple[Any, Callable[[Any], HeadState]] | None]:
        """States that are walked under a scan, so that one trunk is in memory at a time.

        They are those before the anchor, where there are two or more; not with teachers, who read
        later states, nor with several epochs, which read all states again.

        Returns:
            Their number; and, if there are any, the states stacked, and the function that turns one
            of them into a ``HeadState``, for ``fold``. A derivative runs its trunk again instead of
            keeping its activations, so memory does not grow with the number of steps.
        """
        trajectory = self.trajectory
        count = len(trajectory.states) - trajectory.ends_at_anchor
        if count < 2 or trajectory.epochs > 1 or self.loop.config.distils:
            return 0, None
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trajectory.states[:count])
        keys = None if trajectory.dropout is None else trajectory.dropout[:count]
        read = jax.checkpoint(self._read, prevent_cse=False)

        def head_state(entry) -> HeadState:
            state, key = entry
            return self._head_state(state, read(state), key=key)

        return count, ((stacked, keys), head_state)

    def states(self, anchor: Hidden | None, start: int) -> list[HeadState]:
        """One ``HeadState`` per inner step, leaves [groups, ...], from state ``start`` on."""
        trajectory = self.trajectory
        shares = trajectory.ends_at_anchor and anchor is not None
        states = trajectory.states[start:]
        alone = states[: -1 if shares else None]
        hidden: list[Any] = [self._read(state) for state in alone] + [anchor] * shares
        teachers: Sequence[Hidden | None] = [None] * len(hidden)
        if self.loop.config.distils:
            teachers = self._teachers(hidden, anchor)
        keys, steps = trajectory.dropout, []
        for step in range(len(states) * trajectory.epochs):
            k = step % len(states)
            key = None if keys is None else keys[start + step]
            steps.append(self._head_state(states[k], hidden[k], teachers[k], key))
        return steps

    def _read(self, state: NoisyState) -> Hidden:
        context, entered = self.trajectory.context, self.loop.enters(self.rule)
        return self.loop.read(self.theta, state, context, entered)

    def _head_state(self, state: NoisyState, hidden, teacher=None, key=None) -> HeadState:
        read = HeadState(
            self.rule.inner_hidden(hidden),
            self.trajectory.context,
            state.targets,
            state.weight,
            teacher,
            entered=self.loop.enters(self.rule),
        )
        return fast_weights.group_rows(read, self.groups).replace(dropout_key=key)

    def _teachers(self, hidden: list[Hidden], anchor: Hidden | None) -> list[Hidden]:
        """Frozen hidden states of what the teacher of each state reads."""
        stop, trajectory, loop = jax.lax.stop_gradient, self.trajectory, self.loop
        if trajectory.after is not None:
            after = loop.denoiser.trunk(
                stop(self.theta), trajectory.after, trajectory.context, split=loop.split
            )
        elif anchor is not None:
            after = anchor
        else:
            raise ValueError("trajectory.after=None is the anchor, but no anchor is given")
        order = trajectory.teachers or range(1, len(hidden) + 1)
        return [stop([*hidden, after][i]) for i in order]


def fold(
    gradient: InnerGradient,
    theta: Theta,
    phi: Phi,
    states: Sequence[Any],
    optimizer: optax.GradientTransformation,
    measure: Measure | None = None,
    leading: tuple[Any, Callable[[Any], Any]] | None = None,
) -> tuple[Phi, InnerStep]:
    """Take one optimiser step on phi per state, in order.

    Args:
        gradient: of the inner loss in phi, see ``memory.meta_gradient``.
        theta: base parameters, read only.
        phi: fast weights, leaves [g, ...].
        states: one per inner step, leaves [g, ...].
        optimizer: applied to every group on its own, its state starting afresh.
        measure: the loss to record after every step; ``None`` records NaN.
        leading: (entries stacked along a first axis, entry -> state) of steps before those of
            ``states``, walked under a scan: each state is made when its step is taken.

    Returns:
        The adapted phi, and the record of the steps. A step whose loss or gradient is not finite
        leaves its group's phi and optimiser state as they were and is counted as skipped. With
        ``forward_over_reverse_gradient`` it leaves no trace in derivatives either, unless theta
        itself, or the trunk that a state was computed with, is not finite.
    """

    def step(before, state):
        phi, optimizer_state = before
        loss, grads = gradient(theta, phi, state)
        norm = jax.lax.stop_gradient(fast_weights.group_norms(grads))
        fine = jnp.isfinite(loss) & jnp.isfinite(norm)
        grads = harmless(fine, grads)
        updates, new_state = jax.vmap(optimizer.update)(grads, optimizer_state, phi)
        phi = choose_groups(fine, optax.apply_updates(phi, updates), phi)
        phi = partitioning.constrain_tree(phi, "rows")
        loss = jax.lax.stop_gradient(loss)
        after = jnp.full_like(loss, jnp.nan) if measure is None else measure(theta, phi, state)
        kept = phi, choose_groups(fine, new_state, optimizer_state)
        return kept, InnerStep(loss, after, norm, ~fine)

    reached, records = (phi, jax.vmap(optimizer.init)(phi)), []
    if leading is not None:
        entries, make = leading
        reached, record = jax.lax.scan(lambda at, x: step(at, make(x)), reached, entries)
        records.append(record)
    for state in states:
        reached, record = step(reached, state)
        records.append(jax.tree.map(lambda x: x[None], record))
    return reached[0], jax.tree.map(lambda *steps: jnp.concatenate(steps), *records)


def choose_groups(fine: Bool[Array, "g"], new, old):
    """Choose per group between two trees, ``new`` where ``fine``."""
    return jax.tree.map(
        lambda a, b: jnp.where(fine.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, old
    )


def harmless(fine: Bool[Array, "g"], tree):
    """The tree with ones for the groups that are skipped.

    Choosing the old value afterwards is not enough for a derivative: it sends a zero back through
    the step, and zero times NaN is NaN. Ones, because norms and roots have no derivative at zero.
    """
    return choose_groups(fine, tree, jax.tree.map(jnp.ones_like, tree))


def group_losses(loss: GroupLoss, theta: Theta, phi: Phi, state: Any) -> jax.Array:
    """Losses of all groups, [g]."""
    groups = fast_weights.number_of_groups(phi)
    return partitioning.map_groups(loss, groups, (None, 0, 0))(theta, phi, state)


def sum_over(axis_name: str | None, tree):
    """Sum over a device axis, if there is one."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _measured(loss: GroupLoss, wanted: bool | jax.Array, axis_name: str | None) -> Measure:
    """Losses of all groups as plain numbers, no derivative, computed only where ``wanted``."""

    def measure(theta, phi, state):
        theta, phi, state = jax.lax.stop_gradient((theta, phi, state))
        found = computed_if(wanted, lambda: group_losses(loss, theta, phi, state))
        return sum_over(axis_name, found)

    return measure


def computed_if(wanted: bool | jax.Array, compute: Callable[[], jax.Array]) -> jax.Array:
    """``compute()`` where ``wanted``, a Python or a traced bool; else NaN in its place."""
    shape = jax.eval_shape(compute)
    unknown = jnp.full(shape.shape, jnp.nan, shape.dtype)
    if isinstance(wanted, bool):
        return compute() if wanted else unknown
    return jax.lax.cond(wanted, compute, lambda: unknown)


def _starting_matrix(delta: LowRank | Dense) -> jax.Array:
    return delta.A if isinstance(delta, LowRank) else delta.W


# Inner losses: (denoiser, config, theta, student, teacher, targets) -> losses [b, c].
#
# ``student`` is [b, c, d], last hidden states at the targets, before the final norm; ``teacher``
# likewise, from the frozen model on the next state, for losses marked ``needs_teacher``. Losses
# are in nats for ``ce`` and the two KL divergences. Weights and normalisers are applied later.


@INNER_LOSSES.register("ce")
def cross_entropy(denoiser, config, theta, student, teacher, targets) -> Float[Array, "b c"]:
    """-log p of the clean tokens (paper, equation 6)."""
    del config, teacher
    return objective.label_losses(denoiser, theta, student, targets)


def needs_teacher(loss: Any) -> Any:
    """Mark an inner loss that compares with the frozen model on the next state."""
    loss.needs_teacher = True
    return loss


@INNER_LOSSES.register("distill")
@needs_teacher
def distill(denoiser, config, theta, student, teacher, targets) -> Float[Array, "b c"]:
    """KL(teacher || student)."""
    del targets
    log_student, log_teacher = _log_probabilities(denoiser, config, theta, student, teacher)
    return _kl_divergence(log_teacher, log_student)


@INNER_LOSSES.register("distill_reverse")
@needs_teacher
def distill_reverse(denoiser, config, theta, student, teacher, targets) -> Float[Array, "b c"]:
    """KL(student || teacher)."""
    del targets
    log_student, log_teacher = _log_probabilities(denoiser, config, theta, student, teacher)
    return _kl_divergence(log_student, log_teacher)


@INNER_LOSSES.register("distill_hidden")
@needs_teacher
def distill_hidden(denoiser, config, theta, student, teacher, targets) -> Float[Array, "b c"]:
    """Distance of last hidden states: mean square, or one minus the cosine.

    The public code compares the student before the final norm with the teacher after it.
    """
    del targets
    after = denoiser.normalise(jax.lax.stop_gradient(theta), teacher)
    if config.hidden_distance == "mse":
        return jnp.mean((student - after) ** 2, axis=-1)
    return 1 - jnp.sum(_unit(student) * _unit(after), axis=-1)


def _log_probabilities(denoiser, config, theta, student, teacher):
    frozen = jax.lax.stop_gradient(theta)
    logits = denoiser.readout(theta, student), denoiser.readout(frozen, teacher)
    return [jax.nn.log_softmax(x / config.temperature, axis=-1) for x in logits]


def _kl_divergence(log_p, log_q) -> Float[Array, "b c"]:
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _unit(x: jax.Array) -> jax.Array:
    """Each last axis over its norm, which is at least 1e-12."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-24))


# Inner optimisers: (config, rates) -> optax.GradientTransformation of one group. ``rates`` holds
# the learned rates in phi's structure, leaves [layers], or ``None``.


@INNER_OPTIMIZERS.register("sgd")
def clipped_sgd(config: MemoryConfig, rates: Phi = None) -> optax.GradientTransformation:
    """SGD after clipping (paper, section 4.3), with learned rates or ``learning_rate``."""
    clip = {
        "local": clip_local(config.clip_norm),
        "global": clip_global(config.clip_norm),
        "none": optax.identity(),
    }[config.clip]
    if rates is None:
        return optax.chain(clip, optax.sgd(config.learning_rate))

    def step(g, rate):
        return -rate.reshape(-1, *(1,) * (g.ndim - 1)) * g

    return optax.chain(clip, optax.stateless(lambda g, _: jax.tree.map(step, g, rates)))


def clip_local(norm: float) -> optax.GradientTransformation:
    """Scale every gradient *matrix* (last two axes) whose norm exceeds ``norm`` down to it.

    A stack of layers or experts is clipped matrix by matrix, as the public code clips tensor by
    tensor; the factor is norm / (|g| + 1e-12).
    """

    def one(g):
        return g * _clip_factor(jnp.sum(g**2, axis=(-2, -1), keepdims=True), norm)

    return optax.stateless(lambda grads, _: jax.tree.map(one, grads))


def clip_global(norm: float) -> optax.GradientTransformation:
    """Scale all gradients by one factor where their common norm exceeds ``norm``."""

    def clip(grads, _):
        square = sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))
        return jax.tree.map(lambda g: g * _clip_factor(square, norm), grads)

    return optax.stateless(clip)


def _clip_factor(square: jax.Array, bound: float) -> jax.Array:
    # The gradient of A is exactly zero at phi_0 (B = 0), where d|g|/dg is 0/0: without the inner
    # ``where`` the meta-gradient would be NaN from the first step on.
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    exceeds = (square > 0) & (norm > bound)
    return jnp.where(exceeds, bound / (norm + 1e-12), 1.0)

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
import functools
import math
import operator
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
from memdlm_jax.registry import INNER_LOSSES, INNER_OPTIMIZERS, META_GRADIENTS
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

    Beyond the paper: a learning rate per inner step, matrix and layer as in Meta-SGD (arXiv
    1707.09835), and the start as in MAML (arXiv 1703.03400). With ``first_order`` the inner
    gradients are constants: a rate then gets -<outer gradient, clipped inner gradient>, the start
    the outer gradient at phi_K.

    Attributes:
        log_rates: phi's structure with a leaf [inner steps, layers] for every matrix: the logarithm
            of its inner learning rate at each step in each adapted layer; ``None`` keeps
            ``learning_rate``. What the inner optimiser returns is scaled by rate / learning_rate,
            so that learned rates work with every optimiser.
        start: path -> [layers, in, rank], A of phi_0 (B stays zero, so that phi_0 leaves the
            model unchanged), or [layers, in, out] for dense fast weights; ``None`` draws phi_0.
    """

    log_rates: Phi = None
    start: dict[str, jax.Array] | None = None


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
        constant: the step on this state is a constant of every derivative.
    """

    hidden: Hidden
    context: Context
    targets: Targets
    weight: Float[Array, "b"]
    teacher: Hidden | None = None
    dropout_key: Key | None = None
    entered: bool = flax.struct.field(pytree_node=False, default=False)
    constant: bool = flax.struct.field(pytree_node=False, default=False)


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
            steps = config.inner_steps
            log_rates = jax.tree.map(
                lambda leaf: jnp.full((steps, leaf.shape[0]), rate, leaf.dtype), phi
            )
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
        """Draw phi_0 and what is written into it.

        The paper writes the rows that are scored, on the way to their anchor. A batch with a
        ``context`` writes that instead.

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
        config, denoiser, capacity = self.config, self.denoiser, None
        if batch.context is None:
            rows = trajectories.rows_of_anchor(
                batch, anchor, config, denoiser.mask_token_id, schedule
            )
            count, capacity = len(batch.tokens), anchor.state.targets.positions.shape[1]
        else:
            anchor_key, mask_key = jax.random.split(mask_key)
            rows = trajectories.rows_of_texts(anchor_key, batch.context, config, denoiser)
            count = len(batch.context.tokens)
        groups = fast_weights.groups_for(config, count, parts)
        trajectory = trajectories.draw(
            mask_key, config, rows, groups,
            capacity=capacity,
            axis_name=axis_name if config.scope == "global" else None,
            dropout_key=dropout_key,
        )  # fmt: skip
        return self.start(phi_key, groups, learned), trajectory

    def optimizer(self) -> optax.GradientTransformation:
        """The inner optimiser of one group."""
        return INNER_OPTIMIZERS(self.config.optimizer)(self.config)

    def rate_scales(self, learned: InnerParameters | None) -> Phi:
        """Learned rates over ``learning_rate``, leaves [inner steps, layers]; ``None`` for none."""
        if learned is None or learned.log_rates is None:
            return None
        return jax.tree.map(lambda x: jnp.exp(x) / self.config.learning_rate, learned.log_rates)

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
            ValueError: a teacher reads the anchor, and none is given; or the rates were learned for
                another number of steps.
        """
        if trajectory.in_sequence:
            parts = dataclasses.replace(trajectory, in_sequence=False)

            def write(phi, part):
                return self.adapt(theta, learned, phi, part, rule, measure=measure)

            phi, record = jax.lax.scan(write, phi, parts)
            return phi, jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), record)
        groups, scales = fast_weights.number_of_groups(phi), self.rate_scales(learned)
        count = len(trajectory.states) * trajectory.epochs
        if scales is not None and count != self.config.inner_steps:
            raise ValueError(
                f"memory.masking={self.config.masking!r} drew {count} states, but rates are "
                f"learned for {self.config.inner_steps} (memory.steps, passes and epochs)"
            )
        exact = rule.gradient(self.group_loss)
        constant = META_GRADIENTS("first_order")(rule.axis_name).gradient(self.group_loss)

        def gradient(theta, phi, state: HeadState):
            return (constant if state.constant else exact)(theta, phi, state)

        reader = _Reader(self, rule.inner_theta(theta), trajectory, groups, rule)
        return fold(
            gradient,
            reader.theta,
            phi,
            reader.steps(anchor),
            self.optimizer(),
            _measured(self.group_loss, measure, rule.axis_name),
            scales,
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

    def steps(self, anchor: Hidden | None) -> Sequence["HeadState | Scanned"]:
        """What ``fold`` walks: the states in order, leaves [groups, ...].

        States before the anchor are read under a scan, one trunk at a time, which a derivative runs
        again instead of keeping its activations: memory does not grow with their number. (On a CPU
        this is also faster than keeping them.) With teachers, who read later states, or several
        epochs, which read all states again, each state is read once and kept.
        """
        trajectory, config = self.trajectory, self.loop.config
        total = len(trajectory.states) * trajectory.epochs
        constant = total - config.unroll if config.unroll else 0
        together = len(trajectory.states) - trajectory.ends_at_anchor
        if together < 2 or trajectory.epochs > 1 or config.distils:
            together = 0
        cut = min(constant, together)
        steps: list[HeadState | Scanned] = []
        for first, last in ((0, cut), (cut, together)):
            if first < last:
                steps.append(self._scanned(first, last, last <= constant))
        return [*steps, *self._one_by_one(anchor, together, constant)]

    def _scanned(self, first: int, last: int, constant: bool) -> "Scanned":
        """States ``first .. last - 1`` under one scan."""
        trajectory = self.trajectory
        states = trajectory.states[first:last]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        keys = None if trajectory.dropout is None else trajectory.dropout[first:last]
        read = jax.checkpoint(functools.partial(self._read, constant=constant), prevent_cse=False)

        def head_state(entry) -> HeadState:
            state, key = entry
            return self._head_state(state, read(state), key=key, constant=constant)

        return Scanned((stacked, keys), head_state)

    def _one_by_one(
        self, anchor: Hidden | None, start: int, constant: int
    ) -> Sequence["HeadState | Scanned"]:
        """The steps from number ``start`` on; those before number ``constant`` are constants."""
        trajectory = self.trajectory
        shares = trajectory.ends_at_anchor and anchor is not None
        states = trajectory.states[start:]
        alone = states[: -1 if shares else None]
        hidden: list[Any] = [self._read(state) for state in alone] + [anchor] * shares
        teachers: Sequence[Hidden | None] = [None] * len(hidden)
        if self.loop.config.distils:
            teachers = self._teachers(hidden, anchor)
        keys, steps = trajectory.dropout, []
        for step in range(start, len(trajectory.states) * trajectory.epochs):
            k = (step - start) % len(states)
            key = None if keys is None else keys[step]
            steps.append(self._head_state(states[k], hidden[k], teachers[k], key, step < constant))
        return steps

    def _read(self, state: NoisyState, constant: bool = False) -> Hidden:
        context, entered = self.trajectory.context, self.loop.enters(self.rule)
        theta = jax.lax.stop_gradient(self.theta) if constant else self.theta
        return self.loop.read(theta, state, context, entered)

    def _head_state(
        self, state: NoisyState, hidden, teacher=None, key=None, constant=False
    ) -> HeadState:
        hidden = self.rule.inner_hidden(hidden)
        read = HeadState(
            jax.lax.stop_gradient(hidden) if constant else hidden,
            self.trajectory.context,
            state.targets,
            state.weight,
            teacher,
            entered=self.loop.enters(self.rule),
            constant=constant,
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


@dataclasses.dataclass(frozen=True)
class Scanned:
    """States that ``fold`` walks under a scan: each is made when its step is taken.

    Attributes:
        entries: stacked along a first axis.
        make: entry -> state.
    """

    entries: Any
    make: Callable[[Any], Any]


def fold(
    gradient: InnerGradient,
    theta: Theta,
    phi: Phi,
    states: Sequence[Any],
    optimizer: optax.GradientTransformation,
    measure: Measure | None = None,
    scales: Phi = None,
) -> tuple[Phi, InnerStep]:
    """Take one optimiser step on phi per state, in order.

    Args:
        gradient: of the inner loss in phi, see ``memory.meta_gradient``.
        theta: base parameters, read only.
        phi: fast weights, leaves [g, layers, ...].
        states: one per inner step, leaves [g, ...]; or ``Scanned`` for several.
        optimizer: applied to every group on its own, its state starting afresh.
        measure: the loss to record after every step; ``None`` records NaN.
        scales: factors on what the optimiser returns, like phi with leaves [steps, layers];
            ``None`` is 1.

    Returns:
        The adapted phi, and the record of the steps. A step whose loss or gradient is not finite
        leaves its group's phi and optimiser state as they were and is counted as skipped. With
        ``forward_over_reverse_gradient`` it leaves no trace in derivatives either, unless theta
        itself, or the trunk that a state was computed with, is not finite.
    """

    def step(before, state, scale):
        phi, optimizer_state = before
        loss, grads = gradient(theta, phi, state)
        norm = jax.lax.stop_gradient(fast_weights.group_norms(grads))
        fine = jnp.isfinite(loss) & jnp.isfinite(norm)
        grads = harmless(fine, grads)
        updates, new_state = jax.vmap(optimizer.update)(grads, optimizer_state, phi)
        if scale is not None:
            updates = jax.tree.map(_scaled_layers, updates, scale)
        phi = choose_groups(fine, optax.apply_updates(phi, updates), phi)
        phi = partitioning.constrain_tree(phi, "rows")
        loss = jax.lax.stop_gradient(loss)
        after = jnp.full_like(loss, jnp.nan) if measure is None else measure(theta, phi, state)
        kept = phi, choose_groups(fine, new_state, optimizer_state)
        return kept, InnerStep(loss, after, norm, ~fine)

    reached, records, taken = (phi, jax.vmap(optimizer.init)(phi)), [], 0
    for part in states:
        if isinstance(part, Scanned):
            make, count = part.make, jax.tree.leaves(part.entries)[0].shape[0]
            own = jax.tree.map(operator.itemgetter(slice(taken, taken + count)), scales)

            def scanned(before, inputs, make=make):
                entry, scale = inputs
                return step(before, make(entry), scale)

            reached, record = jax.lax.scan(scanned, reached, (part.entries, own))
        else:
            count, own = 1, jax.tree.map(operator.itemgetter(taken), scales)
            reached, record = step(reached, part, own)
            record = jax.tree.map(lambda x: x[None], record)
        records.append(record)
        taken += count
    return reached[0], jax.tree.map(lambda *steps: jnp.concatenate(steps), *records)


def _scaled_layers(update: Float[Array, "g n ..."], scale: Float[Array, "n"]) -> jax.Array:
    return update * scale.reshape(-1, *(1,) * (update.ndim - 2)).astype(update.dtype)


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


# Inner optimisers: config -> optax.GradientTransformation of one group. Learned rates scale what it
# returns, see ``InnerParameters``.


@INNER_OPTIMIZERS.register("sgd")
def clipped_sgd(config: MemoryConfig) -> optax.GradientTransformation:
    """SGD after clipping (paper, section 4.3)."""
    clip = {
        "local": clip_local(config.clip_norm),
        "global": clip_global(config.clip_norm),
        "none": optax.identity(),
    }[config.clip]
    return optax.chain(clip, optax.sgd(config.learning_rate))


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

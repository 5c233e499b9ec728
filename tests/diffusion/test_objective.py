"""Losses at gathered targets against plain sums over the whole row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.diffusion.objective import (
    WholeAnswers,
    chunked_token_losses,
    draw_anchor,
    gather_targets,
    row_losses,
    token_losses,
    weighted_sum,
)
from memdlm_jax.diffusion.schedule import CosineSchedule, LinearSchedule
from memdlm_jax.typing import Batch, Texts

ROWS, LENGTH, WIDTH, VOCABULARY = 4, 9, 6, 11
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
MASK = RNG.random((ROWS, LENGTH)) < 0.4
MASK[2] = False
MASK[3] = True
HIDDEN = RNG.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
KERNEL = RNG.normal(size=(WIDTH, VOCABULARY)).astype(np.float32)
WEIGHT = np.array([2.0, 0.5, 1e6, 1.0], np.float32)


@pytest.mark.parametrize("capacity", [None, 5, 50])
def test_targets_are_the_first_masked_positions_in_order(capacity):
    targets = gather_targets(jnp.asarray(TOKENS), jnp.asarray(MASK), capacity)
    slots = min(LENGTH, capacity or LENGTH)
    assert targets.positions.shape == targets.labels.shape == targets.present.shape == (4, slots)
    assert targets.positions.dtype == targets.labels.dtype == jnp.int32
    for row in range(ROWS):
        found = [(i, TOKENS[row, i]) for i in range(LENGTH) if MASK[row, i]][:slots]
        present = np.asarray(targets.present[row])
        assert present.tolist() == [slot < len(found) for slot in range(slots)]
        pairs = zip(targets.positions[row], targets.labels[row], strict=True)
        assert [(int(i), int(token)) for i, token in pairs][: len(found)] == found


def full_logits_loss(hidden):
    """Cross-entropy on the logits of every position, times the mask."""
    log_p = jax.nn.log_softmax(hidden @ KERNEL)
    nll = -jnp.take_along_axis(log_p, TOKENS[..., None], axis=-1)[..., 0]
    return jnp.sum(WEIGHT[:, None] * MASK * nll)


@pytest.mark.parametrize("capacity", [None, LENGTH])
def test_loss_and_gradient_equal_those_on_full_logits(capacity):
    targets = gather_targets(jnp.asarray(TOKENS), jnp.asarray(MASK), capacity)

    def loss(hidden):
        at = jnp.take_along_axis(hidden, targets.positions[..., None], axis=1)
        return weighted_sum(token_losses(at @ KERNEL, targets), targets, jnp.asarray(WEIGHT))

    ours, gradient = jax.jit(jax.value_and_grad(loss))(HIDDEN)
    theirs, expected = jax.jit(jax.value_and_grad(full_logits_loss))(HIDDEN)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    # Gradient at the targets only, however large the weight of a row without any.
    np.testing.assert_array_equal(np.abs(gradient).max(-1) > 0, MASK)
    assert np.isfinite(gradient).all()


def test_slots_without_target_count_for_nothing():
    """Not even a non-finite logit in them reaches the loss."""
    targets = gather_targets(jnp.asarray(TOKENS), jnp.asarray(MASK))
    logits = jnp.asarray(HIDDEN @ KERNEL)
    spoilt = jnp.where(targets.present[..., None], logits, jnp.inf)
    losses = row_losses(logits, targets)
    np.testing.assert_array_equal(row_losses(spoilt, targets), losses)
    assert losses[2] == 0 and (losses[jnp.array([0, 1, 3])] > 0).all()


def test_row_losses_survive_huge_logits():
    targets = gather_targets(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    logits = jnp.array([[[1e4, -1e4], [-1e4, 1e4]]])
    np.testing.assert_allclose(row_losses(logits, targets), [2e4])


@pytest.mark.parametrize("chunk", [1, 4, 5, 11, 50])
def test_chunks_of_the_vocabulary_change_no_derivative(chunk):
    """Loss, gradient and the gradient's derivative, by chunks that divide 11 and that do not."""
    targets = gather_targets(jnp.asarray(TOKENS), jnp.asarray(MASK), 6)
    with jax.enable_x64(True):
        wide = jnp.asarray(HIDDEN[:, :6], jnp.float64), jnp.asarray(KERNEL, jnp.float64)
        wide = (wide[0] * 9, wide[1])  # Logits far apart, so that the shift matters.

        def by_chunks(hidden, kernel):
            losses = chunked_token_losses(hidden, kernel, targets, chunk)
            return jnp.sum(losses * jnp.cos(jnp.arange(6.0))), losses

        def at_once(hidden, kernel):
            losses = token_losses(hidden @ kernel, targets)
            return jnp.sum(losses * jnp.cos(jnp.arange(6.0))), losses

        def derivatives(function):
            gradient = jax.grad(function, (0, 1), has_aux=True)
            (first, losses), (second, _) = jax.jvp(gradient, wide, (wide[0] / 3, wide[1] / 5))
            return first, losses, second

        ours, want = (jax.jit(derivatives, static_argnums=0)(f) for f in (by_chunks, at_once))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), ours, want
        )


def _largest(jaxpr):
    """Most numbers that any array of a program has, those of its inner programs included."""
    sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
    inner = [
        _largest(j if hasattr(j, "eqns") else j.jaxpr)
        for e in jaxpr.eqns
        for value in e.params.values()
        for j in (value if isinstance(value, tuple | list) else (value,))
        if hasattr(j, "eqns") or hasattr(j, "jaxpr")
    ]
    return max([0, *sizes, *inner])


def test_chunked_logits_are_never_all_there():
    targets = gather_targets(jnp.zeros((2, 64), jnp.int32), jnp.ones((2, 64), bool))
    hidden, kernel = jnp.ones((2, 64, 4)), jnp.ones((4, 1000))

    def loss(hidden, kernel, chunk):
        if chunk:
            return chunked_token_losses(hidden, kernel, targets, chunk).sum()
        return token_losses(hidden @ kernel, targets).sum()

    def largest(chunk):
        gradient = jax.grad(lambda *arrays: loss(*arrays, chunk), (0, 1))
        return _largest(jax.make_jaxpr(gradient)(hidden, kernel).jaxpr)

    whole, parts = largest(0), largest(50)
    assert whole == 2 * 64 * 1000 and parts <= 2 * 64 * 50


class TestAnchor:
    """The corrupted rows of the outer loss."""

    def test_each_row_is_masked_at_its_own_time(self):
        maskable = jnp.ones((6, 4000), bool).at[0].set(False).at[1, 2000:].set(False)
        batch = Batch(jnp.zeros(maskable.shape, jnp.int32), maskable, maskable)
        anchor = draw_anchor(jax.random.key(0), batch, 1, LinearSchedule(0.05))
        assert not (anchor.mask & ~maskable).any()
        ratio = anchor.mask.sum(-1)[1:] / maskable.sum(-1)[1:]
        np.testing.assert_allclose(1 / ratio, anchor.weight[1:], rtol=0.3)
        assert np.ptp(ratio) > 0.2

    def test_time_and_mask_are_drawn_apart(self):
        """A lone token is masked with probability E[t]; from one key it would be always."""
        one = jnp.ones((1, 1), bool)
        batch = Batch(jnp.zeros((1, 1), jnp.int32), one, one)

        def masked(key):
            return draw_anchor(key, batch, 1, LinearSchedule()).mask.sum()

        keys = jax.random.split(jax.random.key(0), 1000)
        assert abs(float(jax.jit(jax.vmap(masked))(keys).mean()) - 0.5) < 0.06

    def test_it_holds_the_masked_tokens_and_their_truth(self):
        batch = Batch(*map(jnp.asarray, (TOKENS, np.ones_like(MASK), np.ones_like(MASK))))

        def corruption(key, batch):
            return jnp.asarray(MASK), jnp.arange(4.0)

        anchor = draw_anchor(jax.random.key(0), batch, VOCABULARY, corruption)
        np.testing.assert_array_equal(anchor.state.tokens == VOCABULARY, MASK)
        np.testing.assert_array_equal(anchor.state.targets.present.sum(-1), MASK.sum(-1))
        np.testing.assert_array_equal(anchor.state.weight, np.arange(4.0))
        np.testing.assert_array_equal(anchor.maskable, [LENGTH] * ROWS)

    def test_another_schedule_masks_and_weighs_by_its_own_rule(self):
        maskable = jnp.ones((64, 2000), bool)
        batch = Batch(jnp.zeros(maskable.shape, jnp.int32), maskable, maskable)
        schedule = CosineSchedule(0.1, "low_discrepancy")
        anchor = draw_anchor(jax.random.key(0), batch, 1, schedule)
        t = schedule.sample_times(jax.random.split(jax.random.key(0))[0], 64)
        ratio = np.cos(np.pi / 2 * (1 - t))
        np.testing.assert_allclose(anchor.mask.mean(-1), ratio, atol=0.05)
        weight = np.pi / 2 * np.sin(np.pi / 2 * (1 - t)) / ratio
        np.testing.assert_allclose(anchor.weight, weight, rtol=1e-3)


class TestWholeAnswers:
    """Answers about a text are masked whole, other rows as the schedule has it."""

    def batch(self):
        maskable = jnp.arange(400)[None].repeat(4, 0) >= 100
        valid = jnp.ones_like(maskable)
        written = jnp.zeros((2, 1, 3), bool).at[1].set(True)
        texts = Texts(jnp.zeros((2, 1, 3), int), written)
        return Batch(jnp.zeros(maskable.shape, int), maskable, valid, context=texts)

    @pytest.mark.parametrize("least", [1.0, 0.6])
    def test_by_text(self, least):
        batch = self.batch()
        mask, weight = WholeAnswers(LinearSchedule(), least)(jax.random.key(0), batch)
        assert not (mask & ~batch.maskable).any()
        share = mask.sum(-1) / 300
        assert (share[2:] >= least - 0.1).all()
        np.testing.assert_allclose(weight, 1 / share, rtol=0.25)
        if least == 1.0:
            np.testing.assert_array_equal(mask[2:], batch.maskable[2:])
            np.testing.assert_allclose(weight[2:], 1, rtol=1e-5)
        plain = dataclasses.replace(batch, context=None)
        drawn, _ = WholeAnswers(LinearSchedule(), least)(jax.random.key(0), plain)
        np.testing.assert_array_equal(drawn[:2], mask[:2])

    def test_bad_share(self):
        with pytest.raises(ValueError, match=r"least=0\.0 must be in"):
            WholeAnswers(LinearSchedule(), 0.0)

"""Texts that are written into memory and absent when asked: masks, gradients, segments."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memdlm_jax.diffusion import objective
from memdlm_jax.memory import fast_weights, inner_loop, meta_gradient, trajectory
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.typing import Context, Texts
from tests.memory import tiny
from tests.memory.tiny import LENGTH, MODEL, ROWS, assert_close, settings

TEXTS, SEGMENTS, KEY = 2, 3, jax.random.key(4)
MASKS_KEY = jax.random.key(5)
COVER = {"masking": "cover", "steps": 3, "normalisation": "sum", "clip": "none"}
COVER |= {"pieces": "parallel", "learning_rate": 0.05}

pytestmark = pytest.mark.usefixtures("wide")


def written(mode="exact", **changes):
    return settings(mode, "example", **(COVER | changes))


def texts_of(seed, weighted=True):
    """Two texts of three segments; the last segment of the second is empty, others are shorter."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, MODEL.vocabulary, (TEXTS, SEGMENTS, LENGTH))
    ends = np.array([[8, 5, 3], [7, 8, 0]])
    valid = np.arange(LENGTH) < ends[..., None]
    weight = rng.uniform(0.5, 2.0, tokens.shape) if weighted else None
    return Texts(jnp.asarray(tokens), jnp.asarray(valid), weight)


def drawn(config, seed=0, weighted=True):
    """Phi_0 in float64, the trajectory, and the anchor of four questions, two per text."""
    batch = dataclasses.replace(tiny.batch_of(seed), context=texts_of(seed, weighted))
    return tiny.draw(config, batch)


def states_of(loop, texts):
    """The states that write texts, each into a memory of its own."""
    rows = trajectory.rows_of_texts(KEY, texts, loop.config, MODEL)
    return trajectory.draw(MASKS_KEY, loop.config, rows, len(texts.tokens))


def rows_of(config, seed=0, rows=5):
    tokens = np.random.default_rng(seed).integers(1, 9, (rows, LENGTH))
    valid = np.arange(LENGTH) < np.array([[8], [7], [3], [1], [0]])
    texts = Texts(jnp.asarray(tokens)[:, None], jnp.asarray(valid)[:, None])
    return trajectory.rows_of_texts(KEY, texts, config, MODEL)


@pytest.mark.parametrize("deal", ["random", "spread"])
@pytest.mark.parametrize(("steps", "passes"), [(1, 1), (3, 1), (5, 2), (8, 3)])
def test_cover_makes_every_token_a_target_once_per_pass(steps, passes, deal):
    config = written(steps=steps, passes=passes, deal=deal)
    rows = rows_of(config)
    found = trajectory.cover(KEY, config, rows)
    masks = np.stack(found.masks).reshape(passes, steps, *rows.maskable.shape)
    np.testing.assert_array_equal(masks.sum(1), np.asarray(rows.maskable)[None].repeat(passes, 0))
    sizes = masks.sum(-1)
    assert (sizes.max(1) - sizes.min(1)).max() <= 1
    assert sizes.max() <= found.most
    if passes > 1 and steps > 1:
        assert (masks[0] != masks[1]).any()
    if deal == "spread":
        for mask in masks.reshape(-1, *rows.maskable.shape):
            for row in mask:
                assert (np.diff(np.flatnonzero(row)) == steps).all()


def test_cover_has_no_slot_that_is_never_used():
    found = drawn(written(steps=3)).trajectory.states
    assert [state.targets.positions.shape for state in found] == [(TEXTS * SEGMENTS, 3)] * 3


def test_outer_loss_equals_plain_loops(theta):
    """Exact gradient of writing three segments at once and asking two questions a text."""
    config = written()
    given = drawn(config)
    (loss, sums), gradient = tiny.run(config, theta, given)

    def of_segments(phi, theta, state, own):
        """Inner loss of one text on one state."""
        at, seen = state.targets, Context(given.trajectory.context.attend[own])
        hidden = MODEL.trunk(theta, state.tokens[own], seen, split=1)
        last = MODEL.head(theta, jax.tree.map(lambda x: x[0], phi), hidden, seen, split=1)
        logits = jax.nn.log_softmax(MODEL.readout(theta, last))
        there = jnp.take_along_axis(logits, at.positions[own][..., None], 1)
        clean = jnp.take_along_axis(there, at.labels[own][..., None], -1)[..., 0]
        return -jnp.sum(clean * at.weight[own] * at.present[own])

    def oracle(theta):
        total = 0.0
        for text in range(TEXTS):
            own = slice(text * SEGMENTS, (text + 1) * SEGMENTS)
            phi = jax.tree.map(operator.itemgetter(slice(text, text + 1)), given.phi)
            for state in given.trajectory.states:
                step = jax.grad(of_segments)(phi, theta, state, own)
                phi = jax.tree.map(lambda a, g: a - 0.05 * g, phi, step)
            asked = slice(2 * text, 2 * text + 2)
            anchor = jax.tree.map(operator.itemgetter(asked), given.anchor)
            hidden = MODEL.trunk(theta, anchor.state.tokens, anchor.context, split=1)
            last = fast_weights.head_with_memory(
                MODEL, theta, phi, hidden, anchor.context, split=1,
                at=anchor.state.targets.positions,
            )  # fmt: skip
            total += objective.state_loss(MODEL, theta, last, anchor.state)
        return total

    expected, same = jax.jit(jax.value_and_grad(oracle))(theta)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert_close(gradient, same, 1e-9)
    assert not np.isclose(sums.memory_on, sums.memory_off, rtol=1e-4)


def test_unrolling_all_steps_is_exact(theta):
    given = drawn(written())
    found = tiny.run(written(unroll=3), theta, given)
    assert_close(found, tiny.run(written(), theta, given), 1e-12)


@pytest.mark.parametrize("unroll", [1, 2])
def test_truncated_unrolling_takes_early_steps_for_constants(theta, unroll):
    config = written(unroll=unroll)
    given = drawn(config)
    (loss, _), gradient = tiny.run(config, theta, given)
    loop = InnerLoop(MODEL, written())
    early, late = (
        dataclasses.replace(given.trajectory, states=given.trajectory.states[part])
        for part in (slice(3 - unroll), slice(3 - unroll, 3))
    )

    def oracle(theta):
        phi, _ = loop.adapt(theta, None, given.phi, early, meta_gradient.FirstOrder())
        return meta_gradient.outer_loss(loop, theta, None, phi, late, given.anchor)[0]

    expected, same = jax.jit(jax.value_and_grad(oracle))(theta)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert_close(gradient, same, 1e-10)
    assert not np.allclose(gradient["mix"], tiny.run(written(), theta, given)[1]["mix"], rtol=1e-3)


def test_segments_in_sequence_are_written_one_after_the_other(theta):
    config = written(pieces="sequence", learned=("rates",))
    loop, texts = InnerLoop(MODEL, config), texts_of(0)
    learned = loop.init_learned(KEY)
    learned = jax.tree.map(lambda x: x + 0.3 * np.arange(3.0)[:, None], learned)
    states, phi = states_of(loop, texts), loop.start(KEY, TEXTS)
    phi = jax.tree.map(lambda leaf: leaf.astype(float), phi)
    rule = meta_gradient.Exact()
    found, record = jax.jit(lambda phi: loop.adapt(theta, learned, phi, states, rule))(phi)
    for segment in range(SEGMENTS):
        part = jax.tree.map(lambda leaf, s=segment: leaf[s], states)
        part = dataclasses.replace(part, in_sequence=False)
        np.testing.assert_array_equal(part.context.attend, texts.valid[:, segment])
        phi, _ = loop.adapt(theta, learned, phi, part, rule)
    assert_close(found, phi, 1e-12)
    assert record.loss.shape == (SEGMENTS * 3, TEXTS)


def test_sums_do_not_depend_on_how_many_segments_there_are(theta):
    """With ``sum``, a segment is written beside empty ones as if alone; an empty text is not."""
    loop = InnerLoop(MODEL, written(steps=1))
    whole = texts_of(0, weighted=False)
    alone = jax.tree.map(lambda leaf: leaf[:1, :1], whole)
    empty = dataclasses.replace(whole, valid=whole.valid.at[:, 1:].set(False).at[1].set(False))
    phi = jax.tree.map(lambda leaf: leaf.astype(float), loop.start(KEY, 1))

    def write(texts):
        states = states_of(loop, texts)
        start = jax.tree.map(lambda x: x.repeat(len(texts.tokens), 0), phi)
        return loop.adapt(theta, None, start, states, meta_gradient.Exact())[0]

    found, expected = write(empty), write(alone)
    assert_close(jax.tree.map(lambda x: x[:1], found), expected, 1e-12)
    assert_close(jax.tree.map(lambda x: x[1:], found), phi, 1e-12)


def test_learned_rates_refuse_another_number_of_states(theta):
    loop = InnerLoop(MODEL, written(steps=3, learned=("rates",)))
    learned = loop.init_learned(KEY)
    other = InnerLoop(MODEL, written(steps=4, learned=("rates",)))
    states = states_of(other, texts_of(0))
    with pytest.raises(ValueError, match="drew 4 states, but rates are learned for 3"):
        loop.adapt(theta, learned, loop.start(KEY, TEXTS), states, meta_gradient.Exact())


def test_a_batch_without_context_writes_its_own_rows():
    config = written(steps=2)
    given = tiny.draw(config, tiny.batch_of(0))
    assert fast_weights.number_of_groups(given.phi) == ROWS
    targets = sum(state.targets.present.sum() for state in given.trajectory.states)
    assert targets == given.batch.maskable.sum()


def test_fold_walks_scanned_and_single_states_in_order():
    """A scan of two states between single ones equals four single ones."""

    def loss(theta, phi, state):
        return jnp.sum(theta * phi["w"] ** 2 * state["x"] + phi["w"] * state["x"] ** 2)

    states = [{"x": jnp.full((2, 1), float(k + 1))} for k in range(4)]
    phi = {"w": jnp.ones((2, 3))}
    gradient = meta_gradient.reverse_gradient(loss)
    optimizer = optax.adam(0.1)
    scales = {"w": jnp.arange(1.0, 13.0).reshape(4, 3)}
    plain = inner_loop.fold(gradient, 0.3, phi, states, optimizer, scales=scales)
    pair = inner_loop.Scanned(
        jax.tree.map(lambda a, b: jnp.stack([a, b]), *states[1:3]), lambda entry: entry
    )
    mixed = [states[0], pair, states[3]]
    again = inner_loop.fold(gradient, 0.3, phi, mixed, optimizer, scales=scales)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)

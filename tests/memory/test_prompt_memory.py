"""Writing a prompt into memory: the public code's numbers, and what each row may depend on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.diffusion.objective import gather_targets
from memdlm_jax.memory import fast_weights, prompt_memory, trajectory
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.trajectory import Trajectory
from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.typing import Batch
from tests.memory import golden


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@functools.cache
def recorded():
    """Arrays, settings, our config, the denoiser and its parameters."""
    arrays, settings = golden.load("inference_f64")
    c = settings["config"]
    config = MemoryConfig(
        learning_rate=c["mem_inner_lr"],
        clip_norm=c["mem_inner_grad_clip"],
        rank=c["mem_inner_rank"],
        alpha=c["mem_inner_alpha"],
        layer_fraction=c["mem_inner_layer_fraction"],
    )
    return arrays, settings, config, golden.denoiser(settings), golden.base_theta(settings)


@functools.cache
def recorded_states():
    """One state per recorded update, all positions weighing the same."""
    arrays = recorded()[0]
    tokens = jnp.asarray(arrays["prompt"])[None]
    states = []
    for x, mask in zip(arrays["step_input"], arrays["step_loss_mask"], strict=True):
        weight = trajectory.normalised(jnp.ones(1), jnp.asarray(mask.sum(-1)), groups=1)
        targets = gather_targets(tokens, jnp.asarray(mask))
        states.append(trajectory.State(jnp.asarray(x), targets, weight))
    return [Trajectory((state,), ends_at_anchor=False) for state in states]


@functools.cache
def one_update():
    """(phi, state) -> (phi after the update, record), compiled once."""
    _, _, config, model, theta = recorded()
    valid = jnp.ones((1, 20), bool)

    def update(phi, state):
        return prompt_memory.adapt_to(model, config, theta, phi, state, valid)

    return jax.jit(update)


@functools.cache
def walked():
    """([phi_0, phi_1, phi_2], [record of update 1, of update 2])."""
    arrays, settings, *_ = recorded()
    phis, records = [golden.as_phi(golden.phi_after(arrays, 0, settings), settings)], []
    for state in recorded_states():
        phi, record = one_update()(phis[-1], state)
        phis.append(phi)
        records.append(record)
    return phis, records


class TestRecordedPrompt:
    """The public code's inference path, replayed update by update (tests/golden/README.md)."""

    @pytest.fixture(autouse=True)
    def wide(self):
        with jax.enable_x64(True):
            yield

    def test_losses_and_gradient_norms(self):
        arrays, records = recorded()[0], walked()[1]
        losses = [record.loss[0, 0] for record in records]
        norms = [record.gradient_norm[0, 0] for record in records]
        assert golden.relative(losses, arrays["inner_loss"]) <= 1e-9
        assert golden.relative(norms, arrays["inner_grad_norm"]) <= 1e-9

    def test_fast_weights_after_each_update(self):
        arrays, settings, *_ = recorded()
        for k, phi in enumerate(walked()[0][1:], start=1):
            for module, leaves in golden.phi_after(arrays, k, settings).items():
                for name, theirs in leaves.items():
                    ours = getattr(phi["mlp"][module]["delta"], name)[0]
                    assert golden.relative(ours, theirs) <= 1e-9, (k, module, name)

    def test_logits_of_the_canvas(self):
        """[prompt | 12 masks]: phi_2 gives the memory's logits, phi_0 (B = 0) the plain ones."""
        arrays, _, config, model, theta = recorded()
        split = fast_weights.split_of(model, config)
        canvas = jnp.asarray(arrays["mem/eval/history"][0])
        assert canvas.shape == (1, 32)
        assert (np.asarray(canvas[0, 20:]) == model.mask_token_id).all()

        @jax.jit
        def logits(phi):
            hidden = model.trunk(theta, canvas, split=split)
            last = fast_weights.head_with_memory(model, theta, phi, hidden, split=split)
            return model.readout(theta, last)

        phi_0, _, phi_2 = walked()[0]
        assert golden.relative(logits(phi_2), arrays["mem/logits_canvas"]) <= 1e-9
        assert golden.relative(logits(phi_0), arrays["nomem/logits_canvas"]) <= 1e-9

    def test_the_loss_falls_on_the_states_walked(self):
        phi_0, _, phi_2 = walked()[0]
        for state in recorded_states():
            before, after = (one_update()(phi, state)[1].loss[0, 0] for phi in (phi_0, phi_2))
            assert float(after) < 0.97 * float(before)


MODEL = LLaDA(
    LLaDAConfig(
        vocab_size=20, width=16, num_layers=2, num_heads=2, num_kv_heads=1, hidden_features=24,
        mask_token_id=1, max_length=32,
    )
)  # fmt: skip
CONFIG = MemoryConfig(rank=3, alpha=6.0, layer_fraction=0.5, prompt_mask_ratio=0.4)
ROWS, LENGTH = 3, 12


@pytest.fixture(scope="module")
def theta():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def prompts():
    """(tokens, valid): row 1 is padded on the right, row 2 on the left."""
    tokens = np.random.default_rng(0).integers(2, 20, (ROWS, LENGTH)).astype(np.int32)
    valid = np.ones((ROWS, LENGTH), bool)
    valid[1, 8:] = valid[2, :3] = False
    return tokens, valid


@pytest.fixture(scope="module")
def write(theta):
    return jax.jit(functools.partial(prompt_memory.write_prompt, denoiser=MODEL, config=CONFIG))


def written(write, theta, tokens, valid, key=0):
    """phi as one [rows, parameters] array, and the record."""
    phi, record = write(jax.random.key(key), theta=theta, tokens=tokens, valid=valid)
    assert fast_weights.number_of_groups(phi) == ROWS
    flat = [np.asarray(leaf).reshape(ROWS, -1) for leaf in jax.tree.leaves(phi)]
    return np.concatenate(flat, axis=1), record


def test_every_row_writes_its_own_memory(write, theta, prompts):
    tokens, valid = prompts
    phi, record = written(write, theta, tokens, valid)
    assert record.loss.shape == (2, ROWS) and not record.skipped.any()
    assert (record.loss > 0).all() and (record.gradient_norm > 0).all()
    assert len(np.unique(phi, axis=0)) == ROWS

    changed = tokens.copy()
    changed[1, :8] = tokens[1, :8][::-1]
    other, _ = written(write, theta, changed, valid)
    assert (other == phi).all(axis=1).tolist() == [True, False, True]


def test_padding_is_never_read(write, theta, prompts):
    tokens, valid = prompts
    phi, record = written(write, theta, tokens, valid)
    again, same = written(write, theta, np.where(valid, tokens, 7), valid)
    np.testing.assert_array_equal(again, phi)
    np.testing.assert_array_equal(same.loss, record.loss)


def test_a_row_of_padding_alone_is_harmless(write, theta, prompts):
    tokens, valid = prompts
    phi, record = written(write, theta, tokens, valid & np.array([[True], [True], [False]]))
    assert np.isfinite(phi).all() and record.loss[:, 2].tolist() == [0.0, 0.0]
    assert not record.skipped.any()


def test_the_key_draws_memory_and_masks(write, theta, prompts):
    first, one = written(write, theta, *prompts)
    second, two = written(write, theta, *prompts, key=1)
    assert (first != second).any(axis=1).all() and (one.loss != two.loss).all()


def test_masks_weights_and_targets_of_the_states(theta, monkeypatch):
    """Anchor Bernoulli(ratio) over valid tokens, pre-anchor 1.5 times as many, rows weigh alike."""
    monkeypatch.setattr(prompt_memory, "adapt_to", lambda *given: given)
    tokens = jnp.full((4, 600), 5, jnp.int32)
    valid = jnp.arange(600) < jnp.array([600, 500, 400, 300])[:, None]
    config = dataclasses.replace(CONFIG, prompt_mask_ratio=0.3)
    given = prompt_memory.write_prompt(jax.random.key(3), MODEL, config, theta, tokens, valid)
    phi, (before, anchor) = given[3], given[4].states
    assert fast_weights.number_of_groups(phi) == 4
    masks = [np.asarray(state.tokens) == MODEL.mask_token_id for state in (before, anchor)]
    assert not (masks[1] & ~masks[0]).any() and not (masks[0] & ~np.asarray(valid)).any()
    counts = [mask.sum(-1) for mask in masks]
    np.testing.assert_array_equal(counts[0], counts[1] * 3 // 2)
    np.testing.assert_allclose(counts[1] / valid.sum(-1), 0.3, atol=0.08)
    for state, count in zip((before, anchor), counts, strict=True):
        np.testing.assert_allclose(state.weight, 1 / count, rtol=1e-6)
        assert state.targets.present.sum(-1).tolist() == count.tolist()
        assert (np.asarray(state.targets.labels)[np.asarray(state.targets.present)] == 5).all()


def test_the_place_of_padding_does_not_matter(theta):
    """The same prompt and masks, padded at the end and, with positions to match, in the middle."""
    rng = np.random.default_rng(1)
    prompt = rng.integers(2, 20, 8).astype(np.int32)
    masks = [rng.random(8) < share for share in (0.7, 0.4)]

    def placed(row, filler):
        return np.stack([np.r_[row, [filler] * 4], np.r_[row[:3], [filler] * 4, row[3:]]])

    tokens, valid = placed(prompt, 0), placed(np.ones(8, bool), False)
    positions = placed(np.arange(8, dtype=np.int32), 0)
    states = [
        trajectory.anchor_state(
            prompt_batch(tokens, valid), placed(mask, False), jnp.full(2, 1 / mask.sum()), 1, None
        )
        for mask in masks
    ]
    phi = fast_weights.init(jax.random.key(0), MODEL, CONFIG, 2)
    adapted, record = jax.jit(functools.partial(prompt_memory.adapt_to, MODEL, CONFIG))(
        theta, phi, Trajectory(tuple(states), ends_at_anchor=False), valid, positions
    )
    np.testing.assert_allclose(record.loss[:, 0], record.loss[:, 1], rtol=1e-5)
    for leaf in jax.tree.leaves(adapted):
        np.testing.assert_allclose(leaf[0], leaf[1], atol=1e-5 * np.abs(leaf).max())


def prompt_batch(tokens, valid):
    return Batch(jnp.asarray(tokens), jnp.asarray(valid), jnp.asarray(valid))

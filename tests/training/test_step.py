"""One step: sums over sums, equal micro-batches, learning under every meta-gradient."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.diffusion.objective import LossConfig
from memdlm_jax.memory.inner_loop import InnerLoop, inner_loop_for
from memdlm_jax.parameters import join_learned
from memdlm_jax.training import optimizer, state, step
from memdlm_jax.training import state as states
from memdlm_jax.typing import Context
from tests.training import tiny

KEY = jax.random.key(7)


@functools.cache
def compiled(setup):
    return jax.jit(functools.partial(step.train_step, setup=setup))


@functools.cache
def sums_of(memory, accumulation):
    config = dataclasses.replace(tiny.OPTIMIZER, accumulation=accumulation)
    setup = dataclasses.replace(tiny.setup(memory, corruption=tiny.corrupt), optimizer=config)
    theta = tiny.fresh_state().theta
    return jax.jit(functools.partial(step.gradient_sums, setup))(theta, tiny.batch(), KEY, True)


def assert_close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max(initial=1e-6))


@pytest.mark.parametrize(
    ("memory", "parts"), [(None, 4), (tiny.STEADY_MEMORY, 2)], ids=["mdlm", "memdlm"]
)
def test_micro_batches_of_unequal_token_counts_equal_one_batch(memory, parts):
    assert_close(sums_of(memory, parts), sums_of(memory, 1))


def test_micro_batches_draw_from_keys_of_their_own(monkeypatch):
    def drawn(setup, theta, frozen, batch, key, report):
        return {}, jax.random.uniform(key)

    monkeypatch.setattr(step, "_one_gradient", drawn)
    config = dataclasses.replace(tiny.OPTIMIZER, accumulation=2)
    setup = dataclasses.replace(tiny.setup(), optimizer=config)
    total = step.gradient_sums(setup, {}, tiny.batch(), KEY, True)[1]
    keys = jax.random.split(KEY)
    assert float(total) == pytest.approx(float(sum(map(jax.random.uniform, keys))), rel=1e-6)


def test_the_loss_is_the_sum_over_all_maskable_tokens_of_the_batch():
    _, sums = sums_of(None, 1)
    _, metrics = compiled(tiny.setup(corruption=tiny.corrupt))(
        tiny.fresh_state(), tiny.batch(), KEY, True
    )
    assert metrics["loss/memory_on"] == pytest.approx(float(sums.memory_on) / 35, rel=1e-5)
    assert metrics["maskable"] == 35 and metrics["tokens"] == 47
    gradient_norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(sums_of(None, 1)[0]))) / 35
    assert metrics["gradient_norm"] == pytest.approx(float(gradient_norm), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "steps"),
    [(None, 0), ("first_order", 2), ("trunk_stopped", 1), ("exact", 1)],
)
def test_learns_one_batch_by_heart(kind, steps):
    memory = kind and dataclasses.replace(tiny.MEMORY, meta_gradient=kind, steps=steps)
    take = compiled(tiny.setup(memory, corruption=tiny.corrupt))
    state, losses = tiny.fresh_state(), []
    for i in range(12):
        state, metrics = take(state, tiny.batch(), jax.random.fold_in(KEY, i), i in (0, 11))
        losses.append(float(metrics["loss/memory_off"]))
    assert losses[-1] < 0.8 * losses[0]
    assert int(state.step) == 12


def test_the_same_key_draws_the_same_anchor_with_and_without_memory():
    """With supervised padding that stays visible, too."""
    padding = np.zeros((4, 12), bool)
    padding[:, -3:] = True
    batch = dataclasses.replace(tiny.batch(), padding=padding)
    loss = LossConfig(padding="visible")
    found = []
    for memory in (None, tiny.MEMORY):
        setup = tiny.setup(memory, loss=loss)
        evaluate = jax.jit(functools.partial(step.eval_step, setup=setup))
        found.append(evaluate(tiny.fresh_state().theta, batch, KEY))
    plain, with_memory = found
    assert int(plain.maskable) == int(with_memory.maskable) == 35 - 11
    assert float(with_memory.memory_off) == pytest.approx(float(plain.memory_on), rel=1e-5)


def test_memory_off_is_the_plain_loss_and_costs_nothing_unless_asked_for():
    state, batch = tiny.fresh_state(), tiny.batch()
    take = compiled(tiny.setup(tiny.MEMORY, corruption=tiny.corrupt))
    quiet, quiet_metrics = take(state, batch, KEY, False)
    loud, metrics = take(state, batch, KEY, True)
    plain_loss = float(sums_of(None, 1)[1].memory_on) / 35
    assert metrics["loss/memory_off"] == pytest.approx(plain_loss, rel=1e-5)
    assert metrics["loss/memory_on"] < metrics["loss/memory_off"]
    assert np.isnan(quiet_metrics["loss/memory_off"])
    jax.tree.map(np.testing.assert_array_equal, quiet, loud)


@pytest.mark.parametrize("memory", [None, tiny.MEMORY])
def test_a_loss_by_chunks_of_the_vocabulary_takes_the_same_step(memory):
    chunked = tiny.DENOISER.with_config(vocab_chunk=7)
    setup = tiny.setup(memory, corruption=tiny.corrupt)
    found = [
        compiled(setup.with_denoiser(denoiser))(tiny.fresh_state(), tiny.batch(), KEY, True)
        for denoiser in (tiny.DENOISER, chunked)
    ]
    (_, metrics), (_, others) = found
    for name in ("loss/memory_on", "loss/memory_off", "gradient_norm"):
        assert metrics[name] == pytest.approx(float(others[name]), rel=1e-5)


def test_inner_metrics_are_reported():
    take = compiled(tiny.setup(tiny.MEMORY, corruption=tiny.corrupt))
    _, metrics = take(tiny.fresh_state(), tiny.batch(), KEY, True)
    for k in (1, 2):
        assert metrics[f"inner/loss_after_{k}"] < metrics[f"inner/loss_{k}"]
        assert metrics[f"inner/gradient_norm_{k}"] > 0
    assert metrics["inner/skipped"] == 0
    assert 0 < metrics["inner/phi_change"] < metrics["inner/phi_norm"]
    assert all(np.isfinite(value) for value in metrics.values())


def test_skipped_inner_steps_are_counted():
    """One row's loss weight is infinite: both of its steps are left out, and nothing else."""

    def corrupt(key, rows):
        mask, weight = tiny.corrupt(key, rows)
        return mask, weight.at[1].set(jnp.inf)

    memory = dataclasses.replace(tiny.MEMORY, masking="no_progressive")
    setup = tiny.setup(memory, corruption=corrupt)
    sums = jax.jit(functools.partial(step.eval_step, setup=setup))(
        tiny.fresh_state().theta, tiny.batch(), KEY
    )
    metrics = step.metrics_of(sums)
    assert metrics["inner/skipped"] == 1
    assert sums.inner.taken.tolist() == [3]
    assert np.isfinite(metrics["inner/loss_1"]) and np.isfinite(metrics["inner/loss_after_1"])


def plain_logits(theta, tokens, valid):
    model = tiny.DENOISER
    hidden = model.trunk(theta, tokens, Context(valid), split=model.num_layers)
    return model.readout(theta, hidden)


@pytest.mark.parametrize(
    ("memory", "weighting", "normalisation"),
    [
        (None, "uniform", "token"), (None, "scheduler", "sequence"), (None, "scheduler", "batch"),
        (tiny.STEADY_MEMORY, "scheduler", "token"), (tiny.STEADY_MEMORY, "uniform", "sequence"),
        (tiny.STEADY_MEMORY, "uniform", "batch"),
    ],
)  # fmt: skip
def test_outer_normalisations_against_a_loop(memory, weighting, normalisation):
    """Row 2 has nothing to mask: it counts neither as tokens nor as a row."""
    batch = tiny.batch()
    batch.maskable[2] = False
    loss = LossConfig(weighting, normalisation)
    setup = tiny.setup(memory, corruption=tiny.corrupt, loss=loss)
    sums = jax.jit(functools.partial(step.eval_step, setup=setup))(
        tiny.fresh_state().theta, batch, KEY
    )
    mask, weight = tiny.corrupt(KEY, batch)
    theta, model = tiny.fresh_state().theta, tiny.DENOISER
    noisy = np.where(mask, model.mask_token_id, batch.tokens)
    log_p = jax.nn.log_softmax(jax.jit(plain_logits)(theta, noisy, batch.valid))
    nll = -np.take_along_axis(np.asarray(log_p), batch.tokens[..., None], -1)[..., 0]
    weight = np.ones(4) if weighting == "uniform" else np.asarray(weight)
    rows, counts = (nll * np.asarray(mask)).sum(-1) * weight, batch.maskable.sum(-1)
    expected = {
        "token": rows.sum() / counts.sum(),
        "sequence": (rows / np.maximum(counts, 1)).sum() / 3,
        "batch": rows.sum() / 3,
    }[normalisation]
    metrics = step.metrics_of(sums)
    assert metrics["loss/memory_off"] == pytest.approx(expected, rel=2e-5)
    assert metrics["maskable"] == counts.sum()


@pytest.mark.parametrize(
    ("normalisation", "memory"), [("sequence", tiny.STEADY_MEMORY), ("batch", None)]
)
def test_other_normalisations_span_micro_batches(normalisation, memory):
    loss, found = LossConfig(normalisation=normalisation), []
    for parts in (1, 2):
        config = dataclasses.replace(tiny.OPTIMIZER, accumulation=parts)
        setup = tiny.setup(memory, corruption=tiny.corrupt, loss=loss)
        setup = dataclasses.replace(setup, optimizer=config)
        found.append(compiled(setup)(tiny.fresh_state(config), tiny.batch(), KEY, True))
    (_, one), (_, two) = found
    assert_close(one, two)


class TestDeviceScope:
    def setup(self, groups, accumulation=1):
        memory = dataclasses.replace(tiny.STEADY_MEMORY, scope="device", groups=groups)
        config = dataclasses.replace(tiny.OPTIMIZER, accumulation=accumulation)
        return dataclasses.replace(tiny.setup(memory, corruption=tiny.corrupt), optimizer=config)

    def sums(self, setup):
        theta = tiny.fresh_state().theta
        return jax.jit(functools.partial(step.gradient_sums, setup))(theta, tiny.batch(), KEY, True)

    def test_micro_batches_share_out_the_groups(self):
        """Two memories of two rows each, in one batch or one per micro-batch."""
        assert_close(self.sums(self.setup(2, 2)), self.sums(self.setup(2)))

    def test_groups_must_divide_evenly(self):
        with pytest.raises(ValueError, match=r"memory\.groups=3 must be a multiple of the 2 parts"):
            self.sums(self.setup(3, 2))


class TestLearnedInnerLoop:
    MEMORY = dataclasses.replace(tiny.MEMORY, learned=("rates", "start"), meta_gradient="exact")

    def state(self, config=tiny.OPTIMIZER):
        learned = InnerLoop(tiny.DENOISER, self.MEMORY).init_learned(jax.random.key(9))
        return states.create(join_learned(tiny.fresh_state().theta, learned), config)

    def test_is_trained_beside_theta_at_its_own_pace(self):
        config = dataclasses.replace(tiny.OPTIMIZER, inner_scale=10.0, weight_decay=0.1)
        setup = dataclasses.replace(
            tiny.setup(self.MEMORY, corruption=tiny.corrupt), optimizer=config
        )
        state = self.state(config)
        after, metrics = compiled(setup)(state, tiny.batch(), KEY, True)
        assert all(np.isfinite(value) for value in metrics.values())
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.theta, state.theta)
        # Adam's first step is the learning rate in every entry, whatever the gradient.
        rate = float(metrics["learning_rate"])
        for leaf in jax.tree.leaves(moved.inner.log_rates):
            assert leaf == pytest.approx(10 * rate, rel=0.02)
        for leaf in moved.inner.start.values():
            assert leaf == pytest.approx(rate, rel=0.02), "not decayed, at theta's pace"
        biggest = max(jax.tree.leaves(moved.theta))
        assert biggest == pytest.approx(rate, rel=0.2)

    def test_validation_uses_it(self):
        setup = tiny.setup(self.MEMORY, corruption=tiny.corrupt)
        parameters = self.state().theta
        still = jax.tree.map(lambda leaf: leaf - 100.0, parameters.inner.log_rates)
        evaluate = jax.jit(functools.partial(step.eval_step, setup=setup))
        moving = step.metrics_of(evaluate(parameters, tiny.batch(), KEY))
        frozen = step.metrics_of(evaluate(
            parameters.replace(inner=parameters.inner.replace(log_rates=still)), tiny.batch(), KEY
        ))  # fmt: skip
        assert frozen["inner/phi_change"] == pytest.approx(0, abs=1e-6)
        assert frozen["loss/memory_on"] == pytest.approx(float(frozen["loss/memory_off"]), rel=1e-5)
        assert moving["loss/memory_on"] < frozen["loss/memory_on"]


def test_own_inner_loss_and_optimiser_reach_the_step():
    nothing = dataclasses.replace(tiny.MEMORY, loss="tests.training.tiny:no_loss")
    setup = tiny.setup(nothing, corruption=tiny.corrupt)
    _, metrics = compiled(setup)(tiny.fresh_state(), tiny.batch(), KEY, True)
    assert metrics["inner/loss_1"] == 0
    # phi_0 may be drawn twice in one program, with other rounding.
    assert metrics["inner/phi_change"] == pytest.approx(0, abs=1e-6)
    adam = dataclasses.replace(
        tiny.MEMORY, optimizer="tests.memory.own_parts:adam", learning_rate=0.02
    )
    setup = tiny.setup(adam, corruption=tiny.corrupt)
    _, metrics = compiled(setup)(tiny.fresh_state(), tiny.batch(), KEY, True)
    assert metrics["inner/loss_after_2"] < metrics["inner/loss_2"]


def test_dropout_is_for_training_alone():
    drop = dataclasses.replace(tiny.MEMORY, dropout=0.5)
    results = []
    for memory in (tiny.MEMORY, drop):
        setup = tiny.setup(memory, corruption=tiny.corrupt)
        given = tiny.batch(), KEY
        _, trained = compiled(setup)(tiny.fresh_state(), *given, True)
        sums = jax.jit(functools.partial(step.eval_step, setup=setup))(
            tiny.fresh_state().theta, *given
        )
        results.append((trained, step.metrics_of(sums)))
    (trained, validated), (dropped, same) = results
    assert trained["loss/memory_on"] != dropped["loss/memory_on"]
    assert_close(same, validated)


def test_padding_of_both_losses_is_left_visible():
    """The last three of each row are supervised padding."""
    padding = np.zeros((4, 12), bool)
    padding[:, -3:] = True
    batch = dataclasses.replace(tiny.batch(), padding=padding)
    seen = {}
    for inner, outer in (("none", "masked"), ("inner", "masked"), ("inner", "visible")):
        memory = dataclasses.replace(tiny.MEMORY, padding=inner, steps=1)
        setup = tiny.setup(memory, loss=LossConfig(padding=outer))
        evaluate = jax.jit(functools.partial(step.eval_step, setup=setup))
        sums = evaluate(tiny.fresh_state().theta, batch, KEY)
        seen[inner, outer] = int(sums.maskable)
    assert list(seen.values()) == [35, 35, 35 - 11]


def test_rows_that_cannot_be_cut_into_micro_batches_are_refused():
    config = dataclasses.replace(tiny.OPTIMIZER, accumulation=3)
    setup = dataclasses.replace(tiny.setup(), optimizer=config)
    with pytest.raises(ValueError, match="accumulation=3 must divide the 4 rows"):
        step.gradient_sums(setup, tiny.fresh_state().theta, tiny.batch(), KEY, True)


@pytest.mark.parametrize("memory", [None, tiny.MEMORY], ids=["mdlm", "memdlm"])
def test_narrow_activations_leave_parameters_and_losses_wide(memory):
    narrow = dataclasses.replace(tiny.DENOISER.config, dtype="bfloat16", remat="full")
    config = dataclasses.replace(tiny.OPTIMIZER, accumulation=2)
    denoiser = type(tiny.DENOISER)(narrow)
    setup = step.StepSetup(denoiser, config, inner_loop_for(denoiser, memory))
    take = functools.partial(step.train_step, setup=setup)
    before = tiny.fresh_state()
    after, metrics = jax.eval_shape(take, before, tiny.batch(), KEY, jnp.bool_(True))
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, before)
    assert metrics["loss/memory_on"].dtype == metrics["loss/memory_off"].dtype == jnp.float32


def test_narrow_parameters_are_refused():
    theta = tiny.fresh_state().theta
    theta["final_norm"] = {"scale": theta["final_norm"]["scale"].astype(jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"theta/final_norm/scale is bfloat16, must be float32"):
        state.create(theta, tiny.OPTIMIZER)


def test_validation_does_not_depend_on_the_micro_batches():
    theta = tiny.fresh_state().theta
    config = dataclasses.replace(tiny.OPTIMIZER, accumulation=2)
    whole = tiny.setup(corruption=tiny.corrupt)
    cut = dataclasses.replace(whole, optimizer=config)
    evaluate = (jax.jit(functools.partial(step.eval_step, setup=setup)) for setup in (cut, whole))
    assert_close(*(take(theta, tiny.batch(), KEY) for take in evaluate))


def test_one_memory_cannot_span_micro_batches():
    memory = dataclasses.replace(tiny.MEMORY, scope="global")
    config = dataclasses.replace(tiny.OPTIMIZER, accumulation=2)
    with pytest.raises(ValueError, match=r"accumulation=2 must be 1 with memory.scope='global'"):
        step.StepSetup(tiny.DENOISER, config, InnerLoop(tiny.DENOISER, memory))


def test_decay_spares_norms_and_the_embedding():
    flags = optimizer.decayed(tiny.fresh_state().theta)
    assert not flags["embedding"] and flags["unembedding"]
    assert not flags["final_norm"]["scale"]
    assert not flags["layers"]["attention_norm"]["scale"]
    assert flags["layers"]["mlp"]["down_proj"]["kernel"]


def test_the_learning_rate_rises_and_falls():
    config = optimizer.OptimizerConfig(100, 1.0, warmup_fraction=0.1, end_fraction=0.2)
    rates = [float(optimizer.learning_rate_at(config, i)) for i in (0, 9, 10, 55, 100, 200)]
    np.testing.assert_allclose(rates, [0.1, 1.0, 1.0, 0.6, 0.2, 0.2], atol=1e-6)
    constant = dataclasses.replace(config, schedule="constant")
    assert float(optimizer.learning_rate_at(constant, 99)) == 1.0


@pytest.mark.parametrize(
    "change",
    [
        {"total_steps": 0}, {"learning_rate": 0.0}, {"warmup_fraction": 1.0}, {"beta1": -0.1},
        {"beta2": 1.0}, {"epsilon": 0.0}, {"weight_decay": -1.0}, {"clip_norm": 0.0},
        {"accumulation": 0}, {"end_fraction": 1.5}, {"schedule": "linear"},
    ],
    ids=str,
)  # fmt: skip
def test_bad_optimizer_settings_are_named_with_their_value(change):
    (name, value), = change.items()  # fmt: skip
    with pytest.raises(ValueError, match=rf"optimizer\.{name}={value!r} must be"):
        dataclasses.replace(tiny.OPTIMIZER, **change)


def test_one_memory_of_all_devices_counts_once():
    """Two simulated devices share a memory: sums over memories are those of one."""
    memory = dataclasses.replace(tiny.STEADY_MEMORY, scope="global")
    plain = tiny.setup(memory, corruption=tiny.corrupt)
    mapped = dataclasses.replace(plain, axis_name="devices")
    theta, batch = tiny.fresh_state().theta, tiny.batch()
    halves = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), batch)

    def on_device(rows):
        return step.eval_step(theta, rows, KEY, setup=mapped)

    sums = jax.jit(jax.vmap(on_device, axis_name="devices"))(halves)
    one = jax.jit(functools.partial(step.eval_step, setup=plain))(theta, batch, KEY)
    assert sums.inner.groups.tolist() == [1, 1]
    assert_close(jax.tree.map(lambda leaf: leaf[0], sums), one)


def test_plain_training_never_enters_memory():
    """Without an inner loop no function of ``memdlm_jax.memory`` runs while a step is traced."""
    entered = set()

    def watch(frame, event, _):
        if event == "call" and "memdlm_jax/memory/" in frame.f_code.co_filename:
            entered.add(frame.f_code.co_qualname)

    def trace(memory):
        entered.clear()
        take = functools.partial(step.train_step, setup=tiny.setup(memory))
        sys.setprofile(watch)
        try:
            jax.eval_shape(lambda *given: take(*given, True), tiny.fresh_state(), tiny.batch(), KEY)
        finally:
            sys.setprofile(None)
        return set(entered)

    assert trace(None) == set()
    assert "outer_loss" in trace(tiny.MEMORY)

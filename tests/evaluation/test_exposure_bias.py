import dataclasses

import jax
import numpy as np
import pytest

from memdlm_jax.data.sft import Row
from memdlm_jax.evaluation import exposure_bias
from memdlm_jax.evaluation.exposure_bias import ExposureConfig

CONFIG = ExposureConfig(steps=5, seed=1, resamples=200)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    sizes = [(6, 10), (12, 20), (3, 5), (1, 9), (20, 31)]
    return [Row(rng.integers(5, 200, n).astype(np.int32), prompt) for prompt, n in sizes]


@pytest.fixture(scope="module")
def unsure(systems):
    """The three systems with weights so small that no two guesses are equally certain."""
    return [dataclasses.replace(s, theta=jax.tree.map(lambda x: x / 2, s.theta)) for s in systems]


def curves(system, rows, config=CONFIG, batch_size=2):
    return exposure_bias.dataset_curves(system, rows, config, 0, batch_size)


def sequential_by_hand(system, row, steps):
    """Plain Python: fill an all-masked response with the surest guesses, scoring what is left."""
    denoiser, mask = system.denoiser, system.denoiser.mask_token_id
    canvas, truth = row.tokens.copy(), row.tokens
    canvas[row.prompt_length :] = mask
    total, found = len(truth) - row.prompt_length, []

    @jax.jit
    def forward(tokens):
        hidden = denoiser.trunk(system.theta, tokens[None], split=denoiser.num_layers)
        return jax.nn.log_softmax(denoiser.readout(system.theta, hidden))[0]

    for step in range(steps):
        log_p = np.array(forward(canvas))
        left = np.flatnonzero(canvas == mask)
        assert len(left) == -(-total * (steps - step) // steps)
        found.append(-log_p[left, truth[left]].mean())
        log_p[:, mask] = -np.inf
        keep = -(-total * (steps - step - 1) // steps)
        surest = sorted(left, key=lambda i: -log_p[i].max())[: len(left) - keep]
        canvas[surest] = log_p[surest].argmax(-1)
    return found


def test_the_sequential_loss_is_that_of_a_plain_loop(unsure, rows):
    static, sequential = curves(unsure[0], rows)
    for i, row in enumerate(rows):
        expected = sequential_by_hand(unsure[0], row, CONFIG.steps)
        np.testing.assert_allclose(sequential[i], expected, rtol=2e-4)
    # Before the first step both ways of masking mask everything.
    np.testing.assert_allclose(static[:, 0], sequential[:, 0], rtol=1e-6)
    assert np.abs(static[:, 1:] - sequential[:, 1:]).max() > 1e-3


def test_a_row_does_not_depend_on_its_neighbours_and_memory_matters(unsure, rows):
    plain, _, full = unsure
    others = [rows[4], rows[4], rows[0], rows[3], rows[4]]
    for one, other in zip(curves(full, rows), curves(full, others, batch_size=5), strict=True):
        np.testing.assert_allclose(one[3], other[3], rtol=2e-4)
        assert np.abs(one[2] - other[2]).max() > 1e-2
    other = full.with_memory(None)
    assert np.abs(curves(full, rows)[0] - curves(other, rows)[0]).max() > 1e-3
    fresh = curves(plain, rows, dataclasses.replace(CONFIG, seed=2))
    assert np.abs(curves(plain, rows)[0][:, 1:] - fresh[0][:, 1:]).max() > 1e-3


def test_all_systems_in_one_report(unsure, rows):
    found = exposure_bias.evaluate(unsure[:1], rows, CONFIG, pad_token_id=0, batch_size=5)
    assert found["mask_ratio"] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    (system,) = found["systems"].values()
    static, sequential = curves(unsure[0], rows, batch_size=5)
    np.testing.assert_allclose(system["ratio"], sequential.mean(0) / static.mean(0), rtol=1e-6)
    low, high = np.array(system["interval"])
    assert low[0] == pytest.approx(1, rel=1e-5) and high[0] == pytest.approx(1, rel=1e-5)
    assert (low <= system["ratio"]).all() and (system["ratio"] <= high).all()
    assert (low[1:] < high[1:]).all()


def test_wrong_settings_are_named(unsure, rows):
    with pytest.raises(ValueError, match=r"exposure\.steps=0 must be at least 1"):
        ExposureConfig(steps=0)
    with pytest.raises(ValueError, match="1 rows are too few"):
        exposure_bias.evaluate(unsure, rows[:1], CONFIG, pad_token_id=0)

"""Times of the linear schedule and the weight of the loss."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.diffusion.schedule import LinearSchedule, alpha, loss_weight

SAMPLINGS = ["iid", "low_discrepancy"]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("minimum_time", [1e-3, 0.25])
def test_times_fill_their_range_and_nothing_else(sampling, minimum_time):
    t = LinearSchedule(minimum_time, sampling).sample_times(jax.random.key(0), 4096)
    assert t.shape == (4096,) and t.dtype == jnp.float32
    assert minimum_time <= t.min() and t.max() < 1
    # Uniform: the empirical distribution function is within 0.03 of the straight line (a
    # Kolmogorov-Smirnov distance that 4,096 uniform draws exceed once in 800 keys).
    u = (np.sort(t) - minimum_time) / (1 - minimum_time)
    assert np.abs(u - np.linspace(0, 1, len(u))).max() < 0.03


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_low_discrepancy_puts_one_row_in_each_stratum(rows):
    schedule = LinearSchedule(1e-3, "low_discrepancy")
    for seed in range(5):
        t = np.asarray(schedule.sample_times(jax.random.key(seed), rows), np.float64)
        u = np.sort((t - 1e-3) / (1 - 1e-3))
        np.testing.assert_allclose(np.diff(u), 1 / rows, rtol=1e-4)
        assert -1e-6 <= u[0] < 1 / rows + 1e-6


def test_low_discrepancy_moves_with_the_key():
    schedule = LinearSchedule(1e-3, "low_discrepancy")
    first = [float(schedule.sample_times(jax.random.key(seed), 4)[0]) for seed in range(20)]
    assert np.ptp(first) > 0.5


def test_loss_weight_is_minus_the_slope_of_alpha_over_the_masked_share(float64):
    """w(t) = -alpha'(t) / (1 - alpha(t)), with the public code's 1e-6 in the denominator."""
    t = np.linspace(0.0, 1.0, 101)
    slope = jax.vmap(jax.grad(alpha))(t)
    weight = np.asarray(loss_weight(t))
    np.testing.assert_allclose(weight, -slope / (1 - alpha(t) + 1e-6), rtol=1e-15)
    million = fractions.Fraction(1, 10**6)
    closed = [float(1 / (fractions.Fraction(time) + million)) for time in t]
    np.testing.assert_allclose(weight, closed, rtol=1e-9)


def test_loss_weight_stays_finite_and_keeps_the_dtype():
    weight = loss_weight(jnp.array([0.0, 1.0], jnp.float32))
    assert weight.dtype == jnp.float32
    np.testing.assert_allclose(weight, [1e6, 1.0], rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minimum_time": 0.0}, r"minimum_time=0.0 must lie in \(0, 1\]"),
        ({"minimum_time": -0.1}, "minimum_time=-0.1"),
        ({"minimum_time": 1.5}, "minimum_time=1.5"),
        ({"minimum_time": float("nan")}, "minimum_time=nan"),
        ({"sampling": "antithetic"}, "sampling='antithetic' must be 'iid' or 'low_discrepancy'"),
    ],
)
def test_bad_values_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LinearSchedule(**settings)

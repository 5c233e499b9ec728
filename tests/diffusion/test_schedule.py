"""Times of the linear schedule and the weight of the loss."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.diffusion.schedule import CosineSchedule, LinearSchedule, Schedule

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


@pytest.mark.parametrize("kind", [LinearSchedule, CosineSchedule])
def test_weight_is_minus_the_slope_of_alpha_over_the_masked_share(float64, kind):
    """w(t) = -alpha'(t) / (1 - alpha(t)), with the public code's 1e-6 in the denominator."""
    t, schedule = jnp.linspace(0.0, 1.0, 101), kind()
    slope = jax.vmap(jax.grad(schedule.alpha))(t)
    np.testing.assert_allclose(schedule.alpha_derivative(t), slope, atol=1e-14)
    expected = -slope / (1 - schedule.alpha(t) + 1e-6)
    np.testing.assert_allclose(schedule.weight(t), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(schedule.alpha(t)[jnp.array([0, -1])], [1, 0], atol=1e-15)


def test_linear_weight_keeps_all_digits_at_small_times():
    """In float32: 1 - (1 - t) would be off by 3e-5 at t = 1e-3."""
    million = fractions.Fraction(1, 10**6)
    for t in np.float32([1e-3, 2e-3, 0.3, 1.0]):
        closed = float(1 / (fractions.Fraction(float(t)) + million))
        assert float(LinearSchedule().weight(t)) == pytest.approx(closed, rel=2e-7)


@pytest.mark.parametrize("kind", [LinearSchedule, CosineSchedule])
def test_time_at_inverts_the_mask_ratio(kind):
    """The cosine one by bisection, to the precision of float32."""
    schedule, ratio = kind(), jnp.array([0.0, 1e-3, 0.2, 0.5, 0.9, 1.0])
    found = schedule.mask_ratio(jax.jit(schedule.time_at)(ratio))
    np.testing.assert_allclose(found, ratio, atol=3e-7)


def test_a_schedule_without_its_formulas_says_which_are_missing():
    with pytest.raises(NotImplementedError, match=r"Schedule must define alpha\(t\)"):
        Schedule().mask_ratio(0.5)


def test_loss_weight_stays_finite_and_keeps_the_dtype():
    weight = LinearSchedule().weight(jnp.array([0.0, 1.0], jnp.float32))
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

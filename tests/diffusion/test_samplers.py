"""The plan of a block against plain loops of published samplers, and what is refused."""

import dataclasses

import numpy as np
import pytest

from memdlm_jax.diffusion import samplers
from memdlm_jax.diffusion.samplers import SAMPLERS, DecodeConfig

CONFIG = DecodeConfig(length=12, block_length=6, steps=8)


def block(count, steps, **changes):
    return DecodeConfig(length=count, block_length=count, steps=steps, **changes)


@pytest.mark.parametrize(
    ("count", "steps", "quotas"),
    [(8, 4, [2, 2, 2, 2]), (16, 6, [3, 3, 3, 3, 2, 2]), (5, 5, [1] * 5), (7, 1, [7])],
)
def test_even_quotas_give_the_remainder_to_the_first_steps(count, steps, quotas):
    assert samplers.even_quotas(count, steps) == quotas
    assert samplers.plan(block(count, steps)).quota.tolist() == quotas


@pytest.mark.parametrize("steps", [0, 5])
def test_a_step_without_commits_is_refused(steps):
    with pytest.raises(ValueError, match=rf"steps={steps} must lie in \[1, 4\]"):
        samplers.even_quotas(4, steps)


def scheduler_quotas(count, steps):
    """dLLM: the expected number of tokens to unmask, rounded; empty steps dropped."""
    quotas = []
    for step in range(steps):
        t, s = (steps - step) / steps, (steps - step - 1) / steps
        number = round(count * (1 - s / t))
        count -= number
        quotas.append(number)
    return [number for number in quotas if number]


def timestep_quotas(count, steps):
    """Dream: rounded down, the rest at the last step."""
    times, quotas = np.linspace(1, 1e-3, steps + 1), []
    for step in range(steps):
        number = int(count * (1 - times[step + 1] / times[step])) if step < steps - 1 else count
        count -= number
        quotas.append(number)
    return [number for number in quotas if number]


@pytest.mark.parametrize("count", [1, 10, 16, 33])
@pytest.mark.parametrize("steps", [1, 5, 6, 16, 40])
def test_other_quotas_agree_with_plain_loops(count, steps):
    for name, oracle in (("scheduler", scheduler_quotas), ("timesteps", timestep_quotas)):
        quotas = samplers.plan(block(count, steps, quotas=name)).quota.tolist()
        assert quotas == oracle(count, steps)
        assert sum(quotas) == count


@pytest.mark.parametrize("quotas", ["even", "scheduler", "timesteps"])
def test_shares_of_independent_commits_leave_the_planned_number_masked(quotas):
    config = block(40, 10, quotas=quotas, order="independent")
    share = samplers.plan(config).share
    left = 40 * np.cumprod(1 - share)
    assert len(share) == 10 and share[-1] == 1
    np.testing.assert_allclose(left, np.linspace(36, 0, 10), atol=0.05)


def test_the_scheduler_rounds_up_steps_that_blocks_do_not_divide():
    config = DecodeConfig(length=12, block_length=6, steps=5, quotas="scheduler")
    assert config.steps_per_block == 3
    assert samplers.plan(config).quota.tolist() == scheduler_quotas(6, 3)


def test_published_settings():
    assert SAMPLERS["llada"] == DecodeConfig()
    quality, speed = SAMPLERS["llada2_1_quality"], SAMPLERS["llada2_1_speed"]
    assert (quality.threshold, quality.editing_threshold) == (0.7, 0.5)
    assert (speed.threshold, speed.editing_threshold) == (0.5, 0.0)
    dream = dataclasses.replace(SAMPLERS["dream"], length=40)
    assert (dream.num_blocks, dream.steps_per_block) == (1, 40)
    for name in ("llada2", "llada2_1_quality", "llada2_1_speed", "fast"):
        longer = dataclasses.replace(SAMPLERS[name], length=256)
        assert longer.steps_per_block == longer.block_length == 32, name


def test_a_window_counted_from_the_rows_start_may_take_one_more_block():
    assert DecodeConfig(length=10, block_length=4, steps=12, alignment="row").num_blocks == 4
    assert DecodeConfig(length=9, block_length=4, steps=12, alignment="row").num_blocks == 3
    assert DecodeConfig(length=12, block_length=4, steps=12).num_blocks == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "decode.length=0 must be at least 1"),
        ({"block_length": -1}, "decode.block_length=-1 must be at least 0"),
        ({"block_length": 5}, "decode.block_length=5 must divide length=12"),
        ({"steps": -1}, "decode.steps=-1 must be at least 0"),
        ({"steps": 5}, "decode.steps=5 must be a multiple of the 2 blocks"),
        ({"steps": 14}, "decode.steps=14 must be at most length=12"),
        ({"temperature": -0.1}, "decode.temperature=-0.1 must be at least 0"),
        ({"temperature": float("inf")}, "decode.temperature=inf must be at least 0 and finite"),
        ({"temperature": 1e-9}, "decode.temperature=1e-09 must be 0, or at least 1e-4"),
        ({"order": "best"}, "decode.order='best' must be one of 'confidence', 'margin'"),
        ({"cache": "all"}, "decode.cache='all' must be one of 'none', 'prefix', 'dual'"),
        ({"threshold": 1.5}, r"decode.threshold=1.5 must be in \[0, 1\], or None"),
        ({"editing_threshold": -0.1}, r"decode.editing_threshold=-0.1 must be in \[0, 1\]"),
        ({"top_p": 0.0}, r"decode.top_p=0.0 must be in \(0, 1\]"),
        ({"top_k": -1}, "decode.top_k=-1 must be at least 0"),
        ({"guidance": -1.0}, "decode.guidance=-1.0 must be at least 0"),
        ({"stop": (-1,)}, r"decode.stop=\(-1,\) must be token ids"),
        ({"order": "independent", "threshold": 0.5}, "knows no threshold, no editing"),
        ({"order": "independent", "order_temperature": 0.5}, "and no order_temperature"),
        ({"length": 12.0}, "decode.length=12.0 must be a whole number"),
        ({"temperature": True}, "decode.temperature=True must be a number"),
        ({"top_p": None}, "decode.top_p=None must be a number"),
        ({"stop": [3]}, r"decode.stop=\[3\] must be a tuple of whole numbers"),
        ({"attention": "block_causal", "cache": "dual"}, "nothing behind a block is seen"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **settings)

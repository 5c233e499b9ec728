import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.data.example import Example
from memdlm_jax.data.sft import Row
from memdlm_jax.evaluation import likelihood
from memdlm_jax.evaluation.likelihood import LikelihoodConfig
from memdlm_jax.typing import EVERYTHING

CONFIG = LikelihoodConfig(samples=4, seed=1)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    sizes = [(6, 10), (12, 20), (3, 5), (0, 9), (20, 31)]
    return [Row(rng.integers(5, 200, n).astype(np.int32), prompt) for prompt, n in sizes]


def test_mask_counts_cover_every_time_evenly():
    samples, maskable = 50, jnp.full((40,), 10)
    counts = np.stack(
        [likelihood.mask_counts(maskable, jnp.arange(40), s, samples) for s in range(samples)]
    )
    assert counts.min() == 1 and counts.max() == 10
    np.testing.assert_allclose(np.bincount(counts.ravel())[1:] / counts.size, 0.1, atol=0.002)


def test_the_estimate_is_the_mdlm_bound_of_a_known_model(tokenizer):
    """A model whose loss depends on the number of masks: the bound is sum_n NLL(n) / n."""

    @dataclasses.dataclass(frozen=True)
    class Known:
        num_layers: int = 1
        mask_token_id: int = 1

        def trunk(self, theta, tokens, context=EVERYTHING, *, split):
            masks = (tokens == 1).sum(-1)[:, None, None]
            return jnp.broadcast_to(masks.astype(jnp.float32), (*tokens.shape, 1))

        def head(self, theta, phi, hidden, context=EVERYTHING, *, split):
            return hidden

        def readout(self, theta, last):
            return jnp.concatenate([jnp.zeros((*last.shape[:2], 3)), jnp.log1p(last)], -1)

    maskable, rows = 5, jnp.arange(400)
    tokens = jnp.full((400, 6), 2)
    mask = jnp.broadcast_to(jnp.arange(6) > 0, tokens.shape)
    batch = likelihood.Batch(tokens, mask, jnp.ones_like(mask))
    losses = likelihood.row_losses(Known(), None, 5, 32, {}, jax.random.key(0), rows, batch)
    # NLL of one masked token with n masks in the row: log(3 + 1 + n); n tokens weigh 1/n each.
    expected = sum(np.log(4 + n) for n in range(1, maskable + 1))
    assert losses.mean() == pytest.approx(expected, rel=0.002)


def test_a_rows_loss_does_not_depend_on_its_neighbours(systems, rows):
    others = [Row(np.full(32, 7, np.int32), 30), *rows[1:]]
    for system in (systems[0], systems[2]):
        losses = likelihood.dataset_losses(system, rows, CONFIG, 0, batch_size=3)
        changed = likelihood.dataset_losses(system, others, CONFIG, 0, batch_size=3)
        assert (losses > 0).all()
        np.testing.assert_allclose(losses[1:], changed[1:], rtol=1e-4)


def test_evaluate_compares_on_the_same_masks(systems, rows):
    again = dataclasses.replace(systems[0], name="again")
    result = likelihood.evaluate(
        [systems[0], again, systems[1]], rows, CONFIG, pad_token_id=0, batch_size=3
    )
    assert result["rows"] == 5
    assert result["maskable_tokens"] == 4 + 8 + 2 + 9 + 11
    same, differ, _ = result["comparisons"]
    assert (same["first"], same["second"]) == ("mdlm", "again")
    assert (same["loss"], same["standard_error"], same["p_value"]) == (0.0, 0.0, 1.0)
    losses = {name: value["loss"] for name, value in result["systems"].items()}
    gap = losses["memdlm_train_only"] - losses["mdlm"]
    assert differ["loss"] == pytest.approx(gap, abs=1e-6)
    assert differ["standard_error"] > 0
    low, high = differ["interval"]
    assert (low + high) / 2 == pytest.approx(differ["loss"])
    assert high - low == pytest.approx(2 * 2.776 * differ["standard_error"], rel=1e-3), "4 degrees"


def test_memory_is_written_from_the_prompt_alone(systems, rows):
    _, train_only, full = systems
    without = likelihood.dataset_losses(train_only, rows, CONFIG, 0, batch_size=3)
    written = likelihood.dataset_losses(full, rows, CONFIG, 0, batch_size=3)
    assert written[3] == pytest.approx(without[3], rel=1e-5), "no prompt, nothing to write"
    assert abs(written[0] - without[0]) > 1e-3


def test_bad_input_is_named(systems, rows):
    with pytest.raises(ValueError, match=r"likelihood\.samples=0 must be at least 1"):
        LikelihoodConfig(samples=0)
    with pytest.raises(ValueError, match="two or more rows"):
        likelihood.evaluate(systems[:1], rows[:1], CONFIG, pad_token_id=0, batch_size=3)


def test_one_row_of_each_conversation(tokenizer):
    def turns(group, count):
        return [Example(f"so {i}?", "yes " * (i + 1), f"talk {group}", "x") for i in range(count)]

    examples = [example for group in range(6) for example in turns(group, group + 1)]
    examples.append(Example("short", "word " * 90, "talk 9", "x"))
    choose = functools.partial(likelihood.held_out_rows, examples, tokenizer, max_length=64)
    rows = choose(count=10, seed=0)
    assert len(rows) == 6, "one of each conversation, and what does not fit is left out"
    assert len(choose(count=3, seed=0)) == 3
    again, other = choose(count=10, seed=0), choose(count=10, seed=1)
    assert all((a.tokens == b.tokens).all() for a, b in zip(rows, again, strict=True))
    assert [len(r.tokens) for r in rows] != [len(r.tokens) for r in other]
    with pytest.raises(ValueError, match="7 groups gave 0 rows of at most max_length=8"):
        likelihood.held_out_rows(examples, tokenizer, max_length=8, count=5, seed=0)

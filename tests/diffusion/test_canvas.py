import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.diffusion import canvas
from memdlm_jax.diffusion.samplers import DecodeConfig

MASK = 99
BY_PROMPT = DecodeConfig(length=4, block_length=4, steps=4)
BY_ROW = dataclasses.replace(BY_PROMPT, alignment="row")


def rows(tokens, valid, config):
    """Every row's own tokens and positions, and where its window begins in them."""
    laid = jax.jit(lambda t, v: canvas.lay_out(t, v, config, MASK))(tokens, valid)
    for row in range(len(tokens)):
        seen = np.asarray(laid.valid[row])
        own = np.asarray(laid.tokens[row])[seen]
        positions = np.asarray(laid.position_ids[row])[seen]
        np.testing.assert_array_equal(positions, np.arange(len(own)))
        filled = np.zeros(seen.shape, bool)
        filled[laid.start :] = laid.fillable[row]
        np.testing.assert_array_equal(own == MASK, filled[seen])
        begins = laid.start + int(laid.offset[row]) - int(seen.argmax())
        yield own.tolist(), begins, (laid.start - int(seen.argmax())) % config.block_length


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("config", [BY_PROMPT, BY_ROW])
def test_padding_on_any_side_makes_the_same_rows(config, side):
    prompts = [[5, 6, 7, 8, 9, 10], [5, 6, 7], [5]]
    width, tokens, valid = 9, np.full((3, 9), 77), np.zeros((3, 9), bool)
    for row, prompt in enumerate(prompts):
        before = {"left": width - len(prompt), "right": 0, "both": 2}[side]
        tokens[row, before : before + len(prompt)] = prompt
        valid[row, before : before + len(prompt)] = True
    for prompt, (own, begins, into) in zip(prompts, rows(tokens, valid, config), strict=True):
        assert begins == len(prompt)
        if config is BY_PROMPT:
            assert own == [*prompt, *[MASK] * 4]
        else:  # Whole blocks, counted from the row's first token.
            length = -(-(len(prompt) + 4) // 4) * 4
            assert own == [*prompt, *[MASK] * (length - len(prompt))]
            assert into == 0


def test_a_prompt_shorter_than_a_block_begins_in_the_window():
    ((own, begins, _),) = rows(np.array([[5, 6]]), np.ones((1, 2), bool), BY_ROW)
    assert (own, begins) == ([5, 6, *[MASK] * 6], 2)


def test_moving_left_keeps_the_tokens_in_order():
    tokens = jnp.array([[0, 0, 5, 6], [7, 8, 0, 0]])
    moved, valid = canvas.move_left(tokens, tokens > 0)
    assert moved.tolist() == [[5, 6, 0, 0], [7, 8, 0, 0]]
    assert valid.tolist() == [[True, True, False, False]] * 2


def test_bad_prompts_are_named():
    with pytest.raises(ValueError, match=r"prompts\[1\] has 0 tokens; it must have 1 to 4"):
        canvas.pad_left([[1], []], 4, 0)
    with pytest.raises(ValueError, match=r"prompts\[0\] has 5 tokens; it must have 1 to 4"):
        canvas.pad_left([[1, 2, 3, 4, 5]], 4, 0)
    with pytest.raises(ValueError, match="prompts is empty"):
        canvas.pad_left([], 4, 0)

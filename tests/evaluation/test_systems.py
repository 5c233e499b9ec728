import dataclasses

import jax
import numpy as np
import pytest

from memdlm_jax.diffusion import decode
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation import systems as library
from memdlm_jax.inference import generation
from memdlm_jax.memory.written import write_prompts

CONFIG = DecodeConfig(length=6, block_length=3, steps=4, temperature=1.0)


def respond(system, prompts, **overrides):
    settings = {"seed": 3, "pad_token_id": 0, "max_length": 32, "batch_size": 2} | overrides
    return library.respond(system, prompts, CONFIG, **settings)


def test_the_three_systems(systems):
    plain, train_only, full = systems
    assert tuple(s.name for s in systems) == library.NAMES
    assert plain.memory is None and train_only.memory is None and full.memory is not None
    assert train_only.theta is full.theta and plain.theta is not full.theta


@pytest.mark.parametrize("which", [0, 2])
def test_an_answer_does_not_depend_on_its_neighbours(systems, which):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 200, n).tolist() for n in (5, 9, 20)]
    together = respond(systems[which], prompts)
    assert together.tokens.shape == (3, CONFIG.length)
    others = [prompts[0], prompts[1][:3], prompts[2]]
    changed = respond(systems[which], others)
    for row in (0, 2):
        np.testing.assert_array_equal(together.tokens[row], changed.tokens[row])
        np.testing.assert_allclose(together.confidence[row], changed.confidence[row], rtol=1e-3)
    alone = respond(systems[which], prompts[:1])
    np.testing.assert_array_equal(together.tokens[0], alone.tokens[0])
    np.testing.assert_allclose(together.confidence[0], alone.confidence[0], rtol=1e-3)


def test_memory_changes_what_is_said(systems):
    prompts = np.random.default_rng(1).integers(5, 200, (2, 20)).tolist()
    _, train_only, full = systems
    without, written = respond(train_only, prompts), respond(full, prompts)
    assert np.abs(without.confidence - written.confidence).max() > 1e-3


def test_compiled_once_for_all_batches_and_seeds(systems):
    prompts = [[7, 8, 9]] * 5
    generation.generate.clear_cache()
    for seed in range(2):
        respond(systems[0], prompts, seed=seed)
    assert generation.generate._cache_size() == 1


def test_prompts_longer_than_the_model_are_written_in_pieces_and_their_end_is_shown(systems):
    full = systems[2]
    streaming = full.with_memory(dataclasses.replace(full.memory, prompt_chunk=16))
    rng = np.random.default_rng(2)
    prompts = [rng.integers(5, 200, n).tolist() for n in (60, 9)]
    said = respond(streaming, prompts)
    # What was cut off is in the memory alone.
    other = [rng.integers(5, 200, 30).tolist() + prompts[0][30:], prompts[1]]
    changed = respond(streaming, other)
    assert np.abs(said.confidence[0] - changed.confidence[0]).max() > 1e-3
    np.testing.assert_array_equal(said.confidence[1], changed.confidence[1])
    without = full.with_memory(None)
    for system in (full, without):
        with pytest.raises(ValueError, match=r"has 60 tokens; it must have at most 26 .*pieces"):
            respond(system, prompts)
    too_long = full.with_memory(dataclasses.replace(full.memory, prompt_chunk=40))
    with pytest.raises(ValueError, match=r"prompt_chunk=40 must be at most max_length=32"):
        respond(too_long, prompts)


def test_weights_that_are_not_finite_end_with_one_line(systems):
    damaged = dataclasses.replace(
        systems[0], theta=jax.tree.map(lambda x: x * np.nan, systems[0].theta)
    )
    with pytest.raises(FloatingPointError, match=r"mdlm: logits are not finite .* damaged$"):
        respond(damaged, [[7, 8, 9]])


def test_texts_end_at_tokens_of_ones_own_too(systems, tokenizer):
    prompts = np.random.default_rng(1).integers(5, 200, (2, 12)).tolist()
    settings = {"seed": 3, "max_length": 32}
    whole = library.reply(systems[0], tokenizer, prompts, CONFIG, **settings)
    token = int(whole.decoded.tokens[0, 4])
    own = dataclasses.replace(CONFIG, stop=(token,))
    cut = library.reply(systems[0], tokenizer, prompts, own, **settings)
    first = whole.decoded.tokens[0].tolist().index(token)
    assert cut.lengths[0] == min(first, whole.lengths[0])
    assert cut.texts[0] == tokenizer.decode(whole.decoded.tokens[0, : cut.lengths[0]])
    with pytest.raises(ValueError, match=r"prompts\[0\] has ids from 5 to 99999; they must lie in"):
        library.reply(systems[0], tokenizer, [[5, 99999]], CONFIG, **settings)


def test_batches_are_joined_with_their_histories(systems):
    prompts = np.random.default_rng(1).integers(5, 200, (3, 12)).tolist()
    config = dataclasses.replace(CONFIG, threshold=0.02)
    settings = {"seed": 3, "pad_token_id": 0, "max_length": 32, "record": True}
    parts = library.respond(systems[0], prompts, config, batch_size=2, **settings)
    whole = library.respond(systems[0], prompts, config, batch_size=3, **settings)
    assert parts.whole > whole.whole
    mask = systems[0].denoiser.mask_token_id
    np.testing.assert_array_equal(decode.history(parts, mask), decode.history(whole, mask))


def test_bad_prompts_are_refused(systems):
    with pytest.raises(ValueError, match=r"has 27 tokens; it must have at most 26"):
        respond(systems[0], [[5] * 27])
    with pytest.raises(ValueError, match=r"prompts\[1\] has 0 tokens"):
        respond(systems[0], [[5], []])
    with pytest.raises(ValueError, match="prompts is empty"):
        respond(systems[0], [])


def test_a_written_prompt_knows_nothing_behind_it(systems, denoiser):
    full = systems[2]
    keys = jax.random.split(jax.random.key(0), 1)
    tokens = np.arange(5, 17)[None]
    valid = np.arange(12)[None] < 8
    write = jax.jit(lambda x: write_prompts(keys, full.inner_loop, full.theta, x, valid)[0])
    for a, b in zip(*map(jax.tree.leaves, (write(tokens), write(tokens * valid))), strict=True):
        np.testing.assert_array_equal(a, b)

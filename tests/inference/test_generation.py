"""Decoding with memory and caches: what must not depend on how it is computed."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.diffusion.canvas import pad_left
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.inference import generation
from memdlm_jax.inference.generation import Generator, Prompts
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop, inner_loop_for
from memdlm_jax.memory.written import write_prompts, write_texts
from memdlm_jax.typing import Texts
from tests.models.small import small, theta_of

# One inner step on one module: what is tested here compiles in a fraction of the time.
MEMORY = MemoryConfig(
    steps=1, rank=2, alpha=4.0, layer_fraction=0.4, learning_rate=5.0,
    target_modules=("up_proj",),
)  # fmt: skip
CAUSAL = DecodeConfig(
    length=8, block_length=4, steps=4, attention="block_causal", alignment="row", threshold=0.6
)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [4, 3, 2, 9], [12, 5]]


@functools.cache
def loud_theta_of(name):
    return jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, theta_of(small(name)))


def arguments(name, prompts=PROMPTS, seed=0):
    tokens, valid = pad_left(prompts, 8, 0)
    keys = jax.random.split(jax.random.key(seed), len(PROMPTS))[: len(prompts)]
    return loud_theta_of(name), Prompts(keys, tokens, valid)


def generator_of(name, memory, config):
    return Generator(small(name), inner_loop_for(small(name), memory), config)


def generate(name, config, memory=MEMORY, **given):
    generator = generator_of(name, memory, config)
    return jax.device_get(generation.generate(generator, *arguments(name), **given))


def assert_same(one, other, tolerance=1e-4):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.commit_step, other.commit_step)
    np.testing.assert_allclose(one.confidence, other.confidence, rtol=tolerance)


@pytest.mark.parametrize(
    ("name", "alignment", "memory"),
    [
        ("llada", "prompt", MEMORY),
        ("dream", "row", MEMORY),
        ("llada_moe", "prompt", None),
        ("llada2", "row", None),
    ],
)
def test_under_block_causal_attention_the_prefix_cache_is_exact(name, alignment, memory):
    config = dataclasses.replace(CAUSAL, alignment=alignment)
    if not name.startswith("llada_moe") and name != "llada2":  # Recorded runs edit with experts.
        config = dataclasses.replace(config, editing_threshold=0.7, post_steps=2)
    plain = generate(name, config, memory)
    cached = generate(name, dataclasses.replace(config, cache="prefix"), memory)
    assert_same(plain, cached)
    assert plain.parts == 0 and cached.whole == 1
    assert plain.whole == cached.whole + cached.parts
    assert len(np.unique(plain.tokens)) > 4, "a model that says one thing tests nothing"


@pytest.mark.parametrize(("name", "cache"), [("llada", "dual"), ("dream", "prefix")])
def test_under_full_attention_caches_are_fresh_when_a_block_begins(name, cache):
    """With one step a block nothing is old."""
    config = DecodeConfig(length=12, block_length=4, steps=3)
    answer = functools.partial(generate, name, memory=None)
    assert_same(answer(config), answer(dataclasses.replace(config, cache=cache)))


def test_under_full_attention_what_was_committed_is_not_seen_before_the_next_block():
    answer = functools.partial(generate, "llada", memory=None)
    longer = DecodeConfig(length=12, block_length=4, steps=12)
    plain, cached = (answer(dataclasses.replace(longer, cache=c)) for c in ("none", "dual"))
    first = plain.commit_step == 0
    np.testing.assert_array_equal(plain.tokens[first], cached.tokens[first])
    assert (cached.whole, cached.parts) == (3, 9) and plain.whole == 12
    assert np.abs(plain.confidence - cached.confidence).max() > 1e-4, "no approximation was made"


def test_under_full_attention_keys_of_the_first_layer_are_never_old():
    """With one layer the prefix cache is exact, if all behind the prefix is computed again."""
    config = DecodeConfig(length=12, block_length=4, steps=12, order="random")
    model = small("llada").with_config(num_layers=1)
    theta = loud_theta_of("llada")
    theta = theta | {"layers": jax.tree.map(lambda x: x[:1], theta["layers"])}
    given = theta, arguments("llada")[1]
    plain, cached = (
        generation.generate(Generator(model, None, dataclasses.replace(config, cache=c)), *given)
        for c in ("none", "prefix")
    )
    assert_same(plain, cached)
    assert (cached.whole, cached.parts) == (3, 9) and plain.whole == 12


def test_guidance_with_a_cache_is_exact_too():
    config = dataclasses.replace(CAUSAL, guidance=0.5)
    plain = generate("llada", config, memory=None)
    assert_same(plain, generate("llada", dataclasses.replace(config, cache="prefix"), memory=None))


def test_a_model_without_keys_and_values_is_refused_a_cache():
    class Plain:
        """Answers the protocol and nothing else."""

        def __init__(self):
            for name in ("trunk", "head", "normalise", "readout", "adaptable"):
                setattr(self, name, getattr(small("llada"), name))
            self.num_layers, self.mask_token_id = 3, 1

    cached = Generator(Plain(), None, dataclasses.replace(CAUSAL, cache="prefix"))
    with pytest.raises(ValueError, match=r"cache='prefix' must be 'none': Plain keeps no keys"):
        generation.generate(cached, *arguments("llada"))
    plain = generation.generate(Generator(Plain(), None, CAUSAL), *arguments("llada"))
    assert_same(plain, generate("llada", CAUSAL, memory=None))


WRITING_ON = dataclasses.replace(MEMORY, adapt_every=1)
EVERY_SECOND = dataclasses.replace(MEMORY, adapt_every=2)
IN_PIECES = dataclasses.replace(CAUSAL, length=16, steps=8, threshold=None)


def test_memory_that_is_written_on_changes_later_blocks_alone():
    config = dataclasses.replace(CAUSAL, attention="full", alignment="prompt", threshold=None)
    before, after = generate("llada", config), generate("llada", config, WRITING_ON)
    np.testing.assert_array_equal(before.tokens[:, :4], after.tokens[:, :4])
    np.testing.assert_array_equal(before.confidence[:, :4], after.confidence[:, :4])
    assert np.abs(before.confidence[:, 4:] - after.confidence[:, 4:]).max() > 1e-3


def test_trunk_caches_survive_new_fast_weights_and_head_caches_are_made_anew():
    """Old keys of the head would change the answers by far more than rounding."""
    cached = dataclasses.replace(IN_PIECES, cache="prefix")
    plain = generate("llada", IN_PIECES, EVERY_SECOND)
    assert_same(plain, generate("llada", cached, EVERY_SECOND))


def test_writing_on_every_second_block_is_the_loop_in_pieces():
    """And a row's memory hangs on its own text, not on its neighbours or its padding."""
    together = generate("llada", IN_PIECES, EVERY_SECOND)
    generator = generator_of("llada", EVERY_SECOND, IN_PIECES)
    theta, prompts = arguments("llada")

    @jax.jit
    def pieces(prompts):
        progress = generation.start(generator, theta, prompts)
        progress = generation.advance(generator, theta, progress, 2)
        progress = generation.write_on(generator, theta, progress)
        progress = generation.advance(generator, theta, progress, 4)
        progress = generation.write_on(generator, theta, progress)
        return generation.finish(generator, generation.advance(generator, theta, progress, 5))

    fewer = pieces(Prompts(prompts.keys[1:], prompts.tokens[1:, 2:], prompts.valid[1:, 2:]))
    assert_same(jax.tree.map(lambda x: x[1:] if x.ndim else x, together), fewer)


def test_watching_shows_every_step_and_ends_with_the_same_answer():
    """Without memory: ``tests/experiments/test_chat.py``."""
    config = dataclasses.replace(CAUSAL, cache="prefix", stop=(7,), threshold=0.9)
    generator = generator_of("llada", WRITING_ON, config)
    seen = list(generation.watch(generator, *arguments("llada")))
    whole = jax.device_get(generation.generate(generator, *arguments("llada")))
    assert_same(seen[-1], whole)
    masks = [int((step.tokens == 1).sum()) for step in seen]
    assert masks[0] == 24 and masks[-1] == 0
    assert len(seen) == whole.whole + whole.parts + 1
    assert all(a >= b for a, b in itertools.pairwise(masks))


def test_a_written_memory_serves_again():
    generator = generator_of("llada", MEMORY, CAUSAL)
    theta, prompts = arguments("llada")
    keys, tokens, valid = prompts.keys, prompts.tokens, prompts.valid
    phi, record = jax.jit(generation.write, static_argnums=0)(generator, theta, prompts)
    assert record.loss.shape == (1, 3)
    at_once = generation.generate(generator, theta, prompts)
    assert_same(at_once, generation.generate(generator, theta, prompts, phi=phi))
    # Another question on the same memory, and another context under the same question.
    questions = Prompts(keys, *pad_left([[9, 8], [9, 8], [9, 8]], 8, 0))
    asked = generation.generate(generator, theta, questions, phi=phi)
    with_text = dataclasses.replace(questions, written=(tokens, valid))
    same = generation.generate(generator, theta, with_text)
    assert_same(asked, same)
    assert np.abs(asked.confidence[0] - asked.confidence[1]).max() > 1e-3
    # One memory for all rows is that memory in every row, also where rows write on in it.
    one = jax.tree.map(lambda leaf: leaf[:1], phi)
    copies = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], 3, axis=0), phi)
    shared = generator_of("llada", WRITING_ON, CAUSAL)
    asked = [generation.generate(shared, theta, questions, phi=each) for each in (one, copies)]
    assert_same(*asked)
    plain = Generator(small("llada"), None, CAUSAL)
    with pytest.raises(ValueError, match="inner_loop=None: there is no memory for phi"):
        generation.generate(plain, theta, prompts, phi=phi)
    with pytest.raises(ValueError, match="inner_loop=None: there is no memory to write into"):
        generation.write(plain, theta, prompts)


GENTLE = dataclasses.replace(MEMORY, learning_rate=0.5)


def write_in_pieces(chunk, prompts):
    """phi and record of prompts that begin in column 0."""
    width = max(map(len, prompts))
    tokens = np.array([[*p, *[0] * (width - len(p))] for p in prompts])
    valid = np.arange(width) < np.array([[len(p)] for p in prompts])
    config = dataclasses.replace(GENTLE, prompt_chunk=chunk)
    keys = jax.random.split(jax.random.key(0), len(prompts))
    theta = loud_theta_of("llada")
    write = jax.jit(
        lambda keys, tokens, valid: write_prompts(
            keys, InnerLoop(small("llada"), config), theta, tokens, valid
        )
    )
    return write(keys, tokens, valid)


def test_a_long_prompt_is_written_piece_by_piece():
    """Pieces of one size, each read alone, the memory of one the start of the next."""
    prompt = np.random.default_rng(0).integers(2, 20, 10).tolist()
    phi, record = write_in_pieces(4, [prompt])
    assert record.loss.shape == (3, 1, 1) and np.isfinite(record.loss).all()
    tokens = jnp.array(
        [[[*piece, *[0] * (4 - len(piece))]] for piece in (prompt[:4], prompt[4:8], prompt[8:])]
    )
    texts = Texts(jnp.swapaxes(tokens, 0, 1), jnp.arange(12).reshape(1, 3, 4) < 10)
    key = jax.random.split(jax.random.key(0), 1)[0]
    loop = InnerLoop(small("llada"), GENTLE)
    own, _ = jax.jit(lambda key, theta: write_texts(key, loop, theta, texts))(
        key, loud_theta_of("llada")
    )
    for ours, theirs in zip(jax.tree.leaves(phi), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_pieces_of_a_row_do_not_depend_on_longer_rows():
    rng = np.random.default_rng(1)
    long, short = (rng.integers(2, 20, n).tolist() for n in (13, 3))
    together, record = write_in_pieces(5, [short, long])
    alone, _ = write_in_pieces(5, [short])
    for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours[:1], theirs, atol=1e-6)
    assert np.isnan(record.loss[1:, :, 0]).all() and np.isfinite(record.loss[:, :, 1]).all()

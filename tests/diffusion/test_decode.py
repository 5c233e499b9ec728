import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.diffusion import decode
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.models.llada import LLaDA, LLaDAConfig

MASK = 20
DENOISER = LLaDA(
    LLaDAConfig(
        vocab_size=24, width=16, num_layers=2, num_heads=2, num_kv_heads=1, hidden_features=32,
        mask_token_id=MASK, max_length=64, dtype="float64", param_dtype="float64",
    )
)  # fmt: skip
CONFIG = DecodeConfig(length=12, block_length=6, steps=8)


@pytest.fixture(scope="module")
def theta():
    """Weights in float64, large enough for predictions that depend on the canvas."""
    with jax.enable_x64(True):
        yield jax.tree.map(lambda x: 3 * x, jax.jit(DENOISER.init)(jax.random.key(0)))


def predictor(theta, valid, length):
    valid, position_ids = decode.canvas_layout(jnp.asarray(valid), length)

    def predict(canvas, columns):
        hidden = DENOISER.trunk(theta, canvas, valid, position_ids, split=2)
        return DENOISER.readout(theta, hidden[:, columns])

    return predict


def run(theta, tokens, valid, config, seeds=None):
    seeds = range(len(tokens)) if seeds is None else seeds
    keys = jax.vmap(jax.random.key)(jnp.array(list(seeds)))
    predict = predictor(theta, valid, config.length)
    return jax.jit(lambda x: decode.decode(predict, keys, x, config, MASK))(jnp.asarray(tokens))


def llada_sampler(theta, prompt, config):
    """LLaDA's generate.py for one prompt in plain Python; (ids, step of every commit)."""
    canvas = np.array([*prompt, *[MASK] * config.length])
    committed_at = np.full(config.length, -1)

    @jax.jit
    def forward(canvas):
        hidden = DENOISER.trunk(theta, canvas[None], split=2)
        return DENOISER.readout(theta, hidden)[0]

    per_block = config.steps // (config.length // config.block_length)
    base, more = divmod(config.block_length, per_block)
    for step in range(config.steps):
        begin = len(prompt) + step // per_block * config.block_length
        logits = np.array(forward(canvas))
        probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        logits[:, MASK] = -np.inf
        best = logits.argmax(-1)
        places = [i for i in range(begin, begin + config.block_length) if canvas[i] == MASK]
        places.sort(key=lambda i: -probabilities[i, best[i]])
        for i in places[: base + (step % per_block < more)]:
            canvas[i] = best[i]
            committed_at[i - len(prompt)] = step
    return canvas[len(prompt) :], committed_at


@pytest.mark.parametrize("steps", [2, 8])
def test_agrees_with_a_plain_loop_of_lladas_sampler(theta, steps):
    config = dataclasses.replace(CONFIG, steps=steps)
    prompts = np.random.default_rng(0).integers(0, MASK, (2, 7))
    decoded = run(theta, prompts, np.ones_like(prompts, bool), config)
    for row, prompt in enumerate(prompts):
        ids, committed_at = llada_sampler(theta, prompt, config)
        np.testing.assert_array_equal(decoded.tokens[row], ids)
        np.testing.assert_array_equal(decoded.commit_step[row], committed_at)
    assert len(np.unique(decoded.tokens)) > 4, "a model that says one thing tests nothing"


def test_a_left_padded_row_gets_what_it_gets_alone(theta):
    config = dataclasses.replace(CONFIG, temperature=1.0)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, MASK, n).tolist() for n in (9, 4)]
    together = run(theta, *decode.pad_left(prompts, 11, pad_token_id=0), config)
    alone = run(theta, *decode.pad_left(prompts[1:], 4, 0), config, seeds=[1])
    np.testing.assert_array_equal(together.tokens[1], alone.tokens[0])
    np.testing.assert_array_equal(together.commit_step[1], alone.commit_step[0])
    np.testing.assert_allclose(together.confidence[1], alone.confidence[0], rtol=1e-6)


def test_history_follows_the_plan(theta):
    decoded = run(theta, np.ones((2, 4), int), np.ones((2, 4), bool), CONFIG)
    canvases = decode.history(decoded, MASK)
    assert canvases.shape == (CONFIG.steps + 1, 2, CONFIG.length)
    assert (canvases[0] == MASK).all()
    np.testing.assert_array_equal(canvases[-1], decoded.tokens)
    assert (np.diff((canvases == MASK).sum(-1), axis=0).T == [-2, -2, -1, -1] * 2).all()
    assert (canvases[4, :, 6:] == MASK).all(), "the second block waits for the first"
    assert not (np.asarray(decoded.tokens) == MASK).any()


def test_compiled_once_and_logits_only_at_the_block():
    traced = []

    def predict(canvas, columns):
        traced.append(columns.shape)
        return jnp.zeros((*canvas.shape[:1], *columns.shape, 24))

    @jax.jit
    def generate(keys, prompts):
        return decode.decode(predict, keys, prompts, CONFIG, MASK).tokens

    for seed in range(3):
        keys = jax.random.split(jax.random.key(seed), 2)
        generate(keys, jnp.full((2, 30), seed))
    assert traced == [(CONFIG.block_length,)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "decode.length=0 must be at least 1"),
        ({"block_length": 5}, "decode.block_length=5 must divide length=12"),
        ({"steps": 5}, "decode.steps=5 must be a multiple of the 2 blocks"),
        ({"steps": 14}, "decode.steps=14 must be at most length=12"),
        ({"temperature": -0.1}, "decode.temperature=-0.1 must be at least 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **settings)


def test_bad_prompts_are_named():
    with pytest.raises(ValueError, match=r"prompts\[1\] has 0 tokens; it must have 1 to 4"):
        decode.pad_left([[1], []], 4, 0)
    with pytest.raises(ValueError, match=r"prompts\[0\] has 5 tokens; it must have 1 to 4"):
        decode.pad_left([[1, 2, 3, 4, 5]], 4, 0)
    with pytest.raises(ValueError, match="prompts is empty"):
        decode.pad_left([], 4, 0)


@pytest.mark.parametrize(("block_length", "expected"), [(4, [9, 9, 9, 9]), (1, [3, 5, 9, 9])])
def test_order_decides_whether_a_long_window_cuts_the_answer_off(block_length, expected):
    """A model that knows the answer (3 5), but is surest of the end (9) in the last column.

    Once an end stands in the window, it takes every column before it for the end as well: what a
    model does that never saw a window longer than its answers.
    """
    end = 9
    answer = jnp.array([3, 5, end, end])

    def predict(canvas, columns):
        ended = jnp.any(canvas[:, 1:] == end, axis=1)
        wanted = jnp.where(ended[:, None], end, answer[columns - 1])
        sureness = jnp.where(columns == 4, 9.0, 5.0)
        return jax.nn.one_hot(wanted, 24) * sureness[None, :, None]

    config = DecodeConfig(length=4, block_length=block_length, steps=4)
    decoded = decode.decode(predict, jax.random.split(jax.random.key(0), 1), jnp.array([[7]]),
                            config, MASK)  # fmt: skip
    assert decoded.tokens[0].tolist() == expected

"""The decode loop on small models: against a plain loop, and rows that know nothing of others.

Runs of the published samplers are in ``test_published_samplers.py``.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.diffusion import decode, reading
from memdlm_jax.diffusion.canvas import lay_out, pad_left
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.inference import generation
from memdlm_jax.inference.generation import Generator, Prompts
from memdlm_jax.models.llada import LLaDA, LLaDAConfig

MASK, END, VOCAB = 20, 9, 24
DENOISER = LLaDA(
    LLaDAConfig(
        vocab_size=VOCAB, width=16, num_layers=2, num_heads=2, num_kv_heads=1, hidden_features=32,
        mask_token_id=MASK, max_length=64, dtype="float64", param_dtype="float64",
    )
)  # fmt: skip
CONFIG = DecodeConfig(length=12, block_length=6, steps=8)


@pytest.fixture(scope="module")
def theta():
    """Weights in float64, so that nothing is tied by rounding; large enough to say something."""
    with jax.enable_x64(True):
        yield jax.tree.map(lambda x: 3 * x, jax.jit(DENOISER.init)(jax.random.key(0)))


def run(theta, tokens, valid, config, seeds=None, record=False):
    seeds = range(len(tokens)) if seeds is None else seeds
    keys = jax.vmap(jax.random.key)(jnp.array(list(seeds)))
    generator = Generator(DENOISER, None, config)
    prompts = Prompts(keys, tokens, valid)
    return jax.device_get(generation.generate(generator, theta, prompts, record=record))


def from_function(predict, prompts, config, record=False):
    """Decode with ``predict(canvas, columns) -> logits`` in the place of a model."""
    prompts = jnp.asarray(prompts)
    keys = jax.random.split(jax.random.key(0), len(prompts))
    readers = [reading.from_predict(predict)] * (1 + (config.guidance > 0))

    @jax.jit
    def whole(prompts, keys):
        canvas = lay_out(prompts, jnp.ones(prompts.shape, bool), config, MASK)
        loop = decode.Loop(readers, keys, canvas, config, MASK)
        return decode.decode(loop, record=record)

    return jax.device_get(whole(prompts, keys))


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
    assert decoded.steps.tolist() == [steps, steps] and decoded.whole == steps


SAMPLERS = {
    "noise": {"temperature": 1.0, "top_p": 0.9, "order": "entropy"},
    "threshold": {"threshold": 0.3, "temperature": 0.7, "stop": (END,)},
    "independent": {"order": "independent", "temperature": 1.0},
    "editing": {
        "threshold": 0.3, "editing_threshold": 0.2, "post_steps": 3, "alignment": "row",
        "attention": "block_causal",
    },
    "by row": {"alignment": "row", "guidance": 0.5, "length": 10},
    "cached": {"threshold": 0.4, "cache": "dual"},
    "prefix": {"threshold": 0.4, "cache": "prefix", "attention": "block_causal"},
    "prefix of all": {"cache": "prefix", "stop": (END,)},
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_padded_row_gets_what_it_gets_alone(theta, name):
    """Whatever its neighbours do, and wherever its padding is."""
    config = dataclasses.replace(CONFIG, **SAMPLERS[name])
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, MASK, n).tolist() for n in (11, 4, 9)]
    tokens, valid = pad_left(prompts, 11, pad_token_id=0)
    tokens[2], valid[2] = np.roll(tokens[2], -2), np.roll(valid[2], -2)  # padded on the right
    together = run(theta, tokens, valid, config, record=True)
    windows = decode.history(together, MASK)
    for row in (1, 2):
        alone = run(theta, *pad_left(prompts[row : row + 1], 11, 0), config, [row], record=True)
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        np.testing.assert_array_equal(together.commit_step[row], alone.commit_step[0])
        np.testing.assert_allclose(together.confidence[row], alone.confidence[0], rtol=1e-6)
        assert together.steps[row] == alone.steps[0]
        steps = alone.steps[0] + 1
        np.testing.assert_array_equal(windows[:steps, row], decode.history(alone, MASK)[:, 0])
    assert not (together.tokens == MASK).any()


def test_history_follows_the_plan(theta):
    decoded = run(theta, np.ones((2, 4), int), np.ones((2, 4), bool), CONFIG, record=True)
    canvases = decode.history(decoded, MASK)
    assert canvases.shape == (CONFIG.steps + 1, 2, CONFIG.length)
    assert (canvases[0] == MASK).all()
    np.testing.assert_array_equal(canvases[-1], decoded.tokens)
    assert (np.diff((canvases == MASK).sum(-1), axis=0).T == [-2, -2, -1, -1] * 2).all()
    assert (canvases[4, :, 6:] == MASK).all(), "the second block waits for the first"
    rebuilt = decode.history(dataclasses.replace(decoded, history=None), MASK)
    np.testing.assert_array_equal(rebuilt, canvases)


def test_compiled_once_and_logits_only_at_the_block():
    traced = []

    def predict(canvas, columns):
        traced.append(columns.shape)
        return jnp.zeros((*canvas.shape[:1], *columns.shape, VOCAB))

    config = dataclasses.replace(CONFIG, threshold=0.5)

    @jax.jit
    def whole(prompts, keys):
        canvas = lay_out(prompts, jnp.ones(prompts.shape, bool), config, MASK)
        loop = decode.Loop([reading.from_predict(predict)], keys, canvas, config, MASK)
        return decode.decode(loop).tokens

    for seed in range(3):
        whole(jnp.full((2, 30), seed), jax.random.split(jax.random.key(seed), 2))
    assert traced == [(CONFIG.block_length,)]


def always(token, logit, others=()):
    """Logits of a model that says one token everywhere, or others in some columns."""

    def predict(canvas, columns):
        wanted = jnp.full(columns.shape, token)
        for column, other in others:
            wanted = jnp.where(columns == column, other, wanted)
        logits = jax.nn.one_hot(wanted, VOCAB) * logit
        return jnp.broadcast_to(logits, (len(canvas), *logits.shape))

    return predict


def test_a_sure_model_takes_a_step_a_block():
    config = dataclasses.replace(CONFIG, threshold=0.9)
    decoded = from_function(always(5, 20.0), [[7, 8]], config)
    assert decoded.steps.tolist() == [2] and decoded.commit_step.tolist() == [[0] * 6 + [1] * 6]
    unsure = from_function(always(5, 1.0), [[7, 8]], config)
    assert unsure.steps.tolist() == [CONFIG.steps]


def test_rows_that_are_finished_wait_frozen():
    """The first row ends in its first block, the second never; 9 stands behind the end."""

    def predict(canvas, columns):
        ends = (canvas[:, :1] == 7) & (columns == 4)
        return jax.nn.one_hot(jnp.where(ends, END, 5), VOCAB) * 8.0

    config = dataclasses.replace(CONFIG, stop=(END,))
    decoded = from_function(predict, [[7, 1], [8, 1]], config, record=True)
    assert decoded.tokens.tolist() == [[5, 5, 9, 5, 5, 5] + [9] * 6, [5] * 12]
    assert decoded.commit_step[0, 6:].tolist() == [-1] * 6
    assert decoded.confidence[0, 6:].tolist() == [0.0] * 6
    assert decoded.steps.tolist() == [4, 8]
    alone = from_function(predict, [[7, 1]], config)
    assert alone.whole == 4 and alone.tokens.tolist() == decoded.tokens[:1].tolist()
    assert (decode.history(decoded, MASK)[4:, 0, 6:] == MASK).all()


def flickering(canvas, columns):
    """Says in every pass another token than what stands there, and first 5."""
    now = canvas[:, columns]
    said = jnp.where(now == MASK, 5, jnp.where(now == 5, 6, 5))
    return jax.nn.one_hot(said, VOCAB) * 20.0


@pytest.mark.parametrize(("threshold", "post_steps", "steps"), [(0.5, 3, 4), (0.5, 0, 1)])
def test_editing_stops_after_so_many_steps(threshold, post_steps, steps):
    config = DecodeConfig(
        length=4, block_length=2, steps=4, threshold=0.9, editing_threshold=threshold,
        post_steps=post_steps,
    )  # fmt: skip
    decoded = from_function(flickering, [[5, 5]], config, record=True)
    assert decoded.steps.tolist() == [2 * steps]
    windows = decode.history(decoded, MASK)[:, 0]
    said = [5, 6, 5, 6][:steps]
    assert windows[1 : steps + 1, :2].tolist() == [[token] * 2 for token in said]
    assert (windows[steps + 1 :, :2] == said[-1]).all(), "a block behind is never edited"
    last = [*[steps - 1] * 2, *[2 * steps - 1] * 2]
    assert decoded.commit_step.tolist() == [last]


def test_without_editing_nothing_committed_changes():
    config = DecodeConfig(length=4, block_length=2, steps=4, threshold=0.9)
    decoded = from_function(flickering, [[5, 5]], config)
    assert decoded.tokens.tolist() == [[5] * 4] and decoded.steps.tolist() == [2]
    sure = dataclasses.replace(config, editing_threshold=1.0)
    calm = from_function(flickering, [[5, 5]], sure)
    assert calm.tokens.tolist() == [[5] * 4] and calm.steps.tolist() == [4]


@pytest.mark.parametrize("changes", [{}, {"editing_threshold": 0.5, "threshold": 0.5}])
def test_logits_that_are_not_finite_leave_no_mask_and_no_endless_loop(changes):
    def predict(canvas, columns):
        return jnp.full((len(canvas), len(columns), VOCAB), jnp.nan)

    config = dataclasses.replace(CONFIG, **changes)
    decoded = from_function(predict, [[5, 5]], config)
    assert not (decoded.tokens == MASK).any() and not np.isfinite(decoded.confidence).any()


def test_guidance_takes_two_readers():
    config = dataclasses.replace(CONFIG, guidance=2.0)
    with pytest.raises(ValueError, match=r"decode\.guidance=2\.0 takes 2 readers, 1 were given"):
        decode.Loop([reading.from_predict(flickering)], None, None, config, MASK)


def test_guidance_keeps_the_tokens_that_it_is_told_to(theta):
    prompts = np.random.default_rng(3).integers(0, MASK, (1, 7))
    valid = np.ones_like(prompts, bool)
    guided = dataclasses.replace(CONFIG, guidance=1.0)
    everything = dataclasses.replace(guided, guidance_keep=tuple(range(VOCAB)))
    plain = run(theta, prompts, valid, CONFIG)
    same = run(theta, prompts, valid, everything)
    np.testing.assert_array_equal(same.tokens, plain.tokens)
    other = run(theta, prompts, valid, guided)
    assert np.abs(other.confidence - plain.confidence).max() > 1e-3


@pytest.mark.parametrize(("block_length", "expected"), [(4, [9, 9, 9, 9]), (1, [3, 5, 9, 9])])
def test_order_decides_whether_a_long_window_cuts_the_answer_off(block_length, expected):
    """A model that knows the answer (3 5), but is surest of the end (9) in the last column.

    Once an end stands in the window, it takes every column before it for the end as well: what a
    model does that never saw a window longer than its answers.
    """
    answer = jnp.array([3, 5, END, END])

    def predict(canvas, columns):
        ended = jnp.any(canvas[:, 1:] == END, axis=1)
        wanted = jnp.where(ended[:, None], END, answer[columns - 1])
        sureness = jnp.where(columns == 4, 9.0, 5.0)
        return jax.nn.one_hot(wanted, VOCAB) * sureness[None, :, None]

    config = DecodeConfig(length=4, block_length=block_length, steps=4)
    assert from_function(predict, [[7]], config).tokens[0].tolist() == expected

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.evaluation import continuations, likelihood
from memdlm_jax.evaluation.continuations import Question
from memdlm_jax.evaluation.likelihood import LikelihoodConfig
from memdlm_jax.memory.written import write_prompts
from memdlm_jax.typing import EVERYTHING

CONFIG = LikelihoodConfig(samples=5, seed=3)
SETTINGS = {"pad_token_id": 0, "max_length": 64}


@pytest.fixture(scope="module")
def pairs():
    """Three contexts, the empty one among them; the first has four continuations."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(5, 200, 9).tolist(), rng.integers(5, 200, 13).tolist()
    ends = [rng.integers(5, 200, n).tolist() for n in (4, 4, 1, 8, 4, 3)]
    return list(zip([first, first, first, first, second, []], ends, strict=True))


@pytest.fixture(scope="module")
def unsure(systems):
    """The plain system and that with memory; no two guesses are equally certain."""
    return [
        dataclasses.replace(s, theta=jax.tree.map(lambda x: x / 2, s.theta))
        for s in (systems[0], systems[2])
    ]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(denoiser, inner_loop, theta, tokens, phi):
    split = denoiser.num_layers if phi is None else inner_loop.split
    hidden = denoiser.trunk(theta, tokens[None], split=split)
    if phi is not None:
        hidden = denoiser.head(theta, phi, hidden, split=split)
    return denoiser.readout(theta, hidden)[0]


def logits_of(system, tokens, phi=None):
    """One row, without padding."""
    given = system.denoiser, system.inner_loop, system.theta, np.asarray(tokens), phi
    return np.array(_logits(*given))


def losses_by_hand(system, context, continuation, phi=None, shown=None):
    """Plain Python: the losses of every masked copy, without padding or a batch."""
    keys, (number,) = continuations.context_keys([context], CONFIG.seed)
    _, (mask_key,) = likelihood.split_keys(keys)
    shown = context if shown is None else shown
    tokens, start = np.array([*shown, *continuation]), len(shown)
    count, losses = len(continuation), []
    for sample in range(CONFIG.samples):
        u = (np.float32(number * likelihood.GOLDEN_RATIO) + sample / CONFIG.samples) % 1.0
        masks = min(1 + int(u * count), count)
        draws = np.array(jax.random.uniform(jax.random.fold_in(mask_key, sample), (1, 128)))[0]
        places = start + np.argsort(draws[start : start + count], kind="stable")[:masks]
        noisy = tokens.copy()
        noisy[places] = system.denoiser.mask_token_id
        logits = logits_of(system, noisy, phi).astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses.append(-log_p[places, tokens[places]].sum() * count / masks)
    return losses


def greedy_by_hand(system, context, count, phi=None):
    """LLaDA's rule in a plain loop: the most probable proposal of all masks, one a step."""
    mask = system.denoiser.mask_token_id
    canvas = np.array([*context, *[mask] * count])
    for _ in range(count):
        p = np.exp(logits_of(system, canvas, phi).astype(np.float64))
        p /= p.sum(-1, keepdims=True)
        p[:, mask] = -1
        left = np.flatnonzero(canvas == mask)
        best = left[p[left].max(-1).argmax()]
        canvas[best] = p[best].argmax()
    return canvas[len(context) :].tolist()


def memory_of(system, context):
    """Written alone, with the key that generation writes with."""
    keys, _ = continuations.context_keys([context], CONFIG.seed)
    memory_key = jax.vmap(jax.random.split)(keys)[:, 0]
    tokens = jnp.array([context], jnp.int32)
    valid = jnp.ones_like(tokens, bool)
    write = jax.jit(write_prompts, static_argnums=1)
    return write(memory_key, system.inner_loop, system.theta, tokens, valid)[0]


def test_scores_are_those_of_a_plain_loop(unsure, pairs):
    for system in unsure:
        asked, losses = [], []
        for context, continuation in pairs:
            phi = memory_of(system, context) if system.memory and context else None
            losses.append(losses_by_hand(system, context, continuation, phi))
            expected = greedy_by_hand(system, context, len(continuation), phi)
            wrong = [*expected[:-1], expected[-1] % 100 + 5]
            asked += [(context, continuation), (context, expected), (context, wrong)]
            assert expected != continuation
        found = continuations.score(system, asked, CONFIG, batch_size=4, **SETTINGS)
        for i, expected in enumerate(losses):
            one, right, wrong = found[3 * i : 3 * i + 3]
            assert one.log_likelihood == pytest.approx(-np.mean(expected), rel=2e-4)
            assert not one.is_greedy and not wrong.is_greedy
            # Masks alone are all equally certain: rounding decides which one is first.
            assert right.is_greedy or not pairs[i][0]


def test_a_score_does_not_depend_on_what_else_is_scored(unsure, pairs):
    for system in unsure:
        found = continuations.score(system, pairs, CONFIG, batch_size=4, **SETTINGS)
        mixed = [*pairs[::-1], ([9] * 30, [5, 6])]
        others = continuations.score(system, mixed, CONFIG, batch_size=4, **SETTINGS)
        for i, one in enumerate(found):
            np.testing.assert_allclose(one.log_likelihood, others[5 - i].log_likelihood, rtol=1e-4)
    (alone,) = continuations.score(system, pairs[3:4], CONFIG, **SETTINGS)
    np.testing.assert_allclose(alone.log_likelihood, found[3].log_likelihood, rtol=1e-4)


def test_draws_do_not_depend_on_the_width():
    keys, _ = continuations.context_keys([[7] * 120, [8]], 0)
    masks = []
    for width in (128, 256):
        maskable = jnp.zeros((2, width), bool).at[:, 100:124].set(True)
        drawn = likelihood.random_masks(keys, jnp.int32(3), maskable, jnp.array([9, 9]))
        masks.append(np.asarray(drawn)[:, :128])
    assert (masks[0] == masks[1]).all() and (masks[0][0] != masks[0][1]).any()


def test_each_context_is_written_once(unsure, pairs, monkeypatch):
    written = []
    write = continuations._write

    def spy(denoiser, inner_loop, theta, keys, batch, learned):
        lengths = np.asarray(batch.valid.sum(-1)).tolist()
        written.append(lengths)
        return write(denoiser, inner_loop, theta, keys, batch, learned)

    monkeypatch.setattr(continuations, "_write", spy)
    continuations.score(unsure[1], pairs, CONFIG, batch_size=4, **SETTINGS)
    # Filled up with the last one to a batch.
    assert sorted(n for lengths in written for n in dict.fromkeys(lengths)) == [0, 9, 13]
    assert all(len(lengths) == 4 for lengths in written)
    written.clear()
    continuations.score(unsure[0], pairs, CONFIG, batch_size=4, **SETTINGS)
    assert written == []


def test_one_token_is_read_once_and_exact(unsure, pairs, monkeypatch):
    seen = []
    measured = continuations._measured

    def spy(denoiser, samples, *rest):
        seen.append(samples)
        return measured(denoiser, samples, *rest)

    monkeypatch.setattr(continuations, "_measured", spy)
    context, continuation = pairs[2]
    (one,) = continuations.score(unsure[0], [pairs[2]], CONFIG, **SETTINGS)
    canvas = [*context, unsure[0].denoiser.mask_token_id]
    log_p = jax.nn.log_softmax(logits_of(unsure[0], canvas))[-1, continuation[0]]
    assert one.log_likelihood == pytest.approx(float(log_p), rel=1e-5)
    assert one.standard_error == 0.0 and seen == [1]
    (single,) = continuations.score(unsure[0], [pairs[0]], LikelihoodConfig(samples=1), **SETTINGS)
    assert math.isnan(single.standard_error)


def test_candidates_of_a_question_share_their_masks(tokenizer, unsure):
    """A model that says how its masks lie: scores of equal candidates are equal to the bit."""

    @dataclasses.dataclass(frozen=True)
    class Positions:
        num_layers: int = 1
        mask_token_id: int = 1

        def trunk(self, theta, tokens, context=EVERYTHING, *, split):
            weight = jnp.sin(jnp.arange(tokens.shape[1]) * 1.7)
            masked = ((tokens == 1) * weight).sum(-1)
            return jnp.broadcast_to(masked[:, None, None], (*tokens.shape, 1))

        def head(self, theta, phi, hidden, context=EVERYTHING, *, split):
            return hidden

        def readout(self, theta, last):
            return jnp.concatenate([jnp.zeros((*last.shape[:2], 300)), last], -1)

    system = dataclasses.replace(unsure[0], denoiser=Positions(), theta={})
    pairs = [([2, 3, 4], [10, 11, 12, 13]), ([2, 3, 4], [20, 21, 22, 23]), ([2, 3], [10] * 4)]
    a, b, c = continuations.score(system, pairs, LikelihoodConfig(3, 1), **SETTINGS)
    assert a.log_likelihood == b.log_likelihood != c.log_likelihood


def test_standard_error_is_the_spread_over_seeds(unsure, pairs):
    found = [
        continuations.score(unsure[0], [pairs[3]], LikelihoodConfig(8, seed), **SETTINGS)[0]
        for seed in range(100)
    ]
    spread = np.std([one.log_likelihood for one in found], ddof=1)
    claimed = np.sqrt(np.mean([one.standard_error**2 for one in found]))
    assert claimed == pytest.approx(spread, rel=0.25)


def test_choice_by_every_norm(tokenizer, unsure):
    questions = [
        Question("the cat sat", ("on mats", "and saw the green bird", "é"), delimiter=" "),
        Question("how every", ("green bird flew", "cat")),
    ]
    settings = {"max_length": 64, "batch_size": 2}
    found = continuations.choose(unsure[0], tokenizer, questions, CONFIG, **settings)
    for question, choice in zip(questions, found, strict=True):
        pairs = [
            continuations.encode_pair(tokenizer, question.context, f" {text}")
            for text in question.candidates
        ]
        scores = continuations.score(unsure[0], pairs, CONFIG, batch_size=2, **SETTINGS)
        values = np.array([one.log_likelihood for one in scores])
        np.testing.assert_allclose([s.log_likelihood for s in choice.scores], values, rtol=1e-5)
        assert choice.best == values.argmax()
        sizes = {
            "token": [len(tokens) for _, tokens in pairs],
            "character": [len(text) for text in question.candidates],
            "byte": [len(text.encode()) for text in question.candidates],
        }
        for name, size in sizes.items():
            chosen = continuations.choose(
                unsure[0], tokenizer, [question], CONFIG, normalise=name, **settings
            )
            assert chosen[0].best == (values / size).argmax(), name


def test_pairs_are_divided_as_in_the_public_harness(tokenizer):
    whole = tokenizer.encode("the cat sat on mats")
    context, continuation = continuations.encode_pair(tokenizer, "the cat ", "sat on mats")
    assert context == tokenizer.encode("the cat") and context + continuation == whole
    assert continuations.encode_pair(tokenizer, "", "the cat") == ([], tokenizer.encode("the cat"))
    with pytest.raises(ValueError, match="continuation='' has no token of its own behind 'cat'"):
        continuations.encode_pair(tokenizer, "cat", "")


def test_long_contexts_need_pieces(unsure):
    full = unsure[1]
    context = np.random.default_rng(1).integers(5, 200, 90).tolist()
    pairs = [(context, [7, 8, 9]), (context, [10, 11])]
    with pytest.raises(ValueError, match="context 0 has 90 tokens and its continuation 3"):
        continuations.score(full, pairs, CONFIG, **SETTINGS)
    memory = dataclasses.replace(full.memory, prompt_chunk=48)
    pieces = full.with_memory(memory)
    found = continuations.score(pieces, pairs, CONFIG, **SETTINGS)
    # Memory has all of it, the canvas what fits before each continuation.
    phi = memory_of(pieces, context)
    for (_, continuation), one in zip(pairs, found, strict=True):
        shown = context[-(64 - len(continuation)) :]
        losses = losses_by_hand(pieces, context, continuation, phi, shown)
        # Draws are by column: those of the end that is shown.
        assert one.log_likelihood == pytest.approx(-np.mean(losses), rel=2e-4)
    with pytest.raises(ValueError, match=r"memory\.prompt_chunk=48 must be at most max_length=40"):
        continuations.score(pieces, pairs, CONFIG, pad_token_id=0, max_length=40)


def test_bad_input_is_named(unsure, systems):
    with pytest.raises(ValueError, match="continuation 0 has 0 tokens; it must have 1 to max_len"):
        continuations.score(unsure[0], [([5], [])], CONFIG, **SETTINGS)
    with pytest.raises(ValueError, match="must lie in"):
        continuations.score(unsure[0], [([5], [10**6])], CONFIG, **SETTINGS)
    with pytest.raises(ValueError, match="must be two or more"):
        Question("a", ("b",))
    broken = dataclasses.replace(
        unsure[0], theta=jax.tree.map(lambda x: x * np.nan, unsure[0].theta)
    )
    with pytest.raises(FloatingPointError, match="mdlm: the loss of a continuation is not finite"):
        continuations.score(broken, [([5], [6, 7])], CONFIG, **SETTINGS)
    assert continuations.score(unsure[0], [], CONFIG, **SETTINGS) == []

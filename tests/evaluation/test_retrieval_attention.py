import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.data.needles import NeedleConfig
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation import needles, retrieval, retrieval_attention, statistics
from memdlm_jax.evaluation.retrieval import RetrievalConfig
from memdlm_jax.evaluation.retrieval_answers import Asked, Run
from memdlm_jax.evaluation.systems import System
from memdlm_jax.inference import generation
from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.models.attention import Attention, attend, attention_weights
from memdlm_jax.models.dream import Dream, DreamConfig
from memdlm_jax.typing import Context
from tests.evaluation.bigram_denoiser import BigramDenoiser
from tests.models.small import FAMILIES, TOKENS

CONFIG = RetrievalConfig(
    NeedleConfig(split="test", template="short"), lengths=(128,), num_keys=(2,), episodes=3
)
_FIELDS = {field.name for field in dataclasses.fields(DreamConfig)}
RUN = Run(needles.left_to_right(4), max_length=160, batch_size=2)


def random_theta(model):
    return jax.tree.map(lambda x: 2 * x, jax.jit(model.init)(jax.random.key(0)))


def random_phi(model, split, modules=("attention", "mlp")):
    """Fast weights of one group that change everything they can."""
    memory = MemoryConfig(
        adapter="full", layer_fraction=1 - (split + 0.1) / model.num_layers,
        target_modules=modules,
    )  # fmt: skip
    phi = fast_weights.init(jax.random.key(1), model, memory, 1)
    leaves, structure = jax.tree.flatten(phi)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    drawn = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def one_group(phi):
    return None if phi is None else jax.tree.map(lambda leaf: leaf[0], phi)


@jax.jit
def show(query, key, value, mask):
    """The weights, and what the fast path makes of them and the values."""
    return attention_weights(query, key, mask), attend(query, key, value, mask)


def test_looking_in_changes_nothing_and_shows_what_attention_did():
    """Weights times values, through the output matrix, are what the layer adds; in two stacks."""
    model, split = FAMILIES["llada2"], 2
    theta, phi = random_theta(model), random_phi(model, split, ("attention",))
    valid = jnp.ones(TOKENS.shape, bool).at[1, -2:].set(False)
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)

    @jax.jit
    def look(theta, phi):
        context = Context(valid, positions)
        return model.inspect(theta, TOKENS, context, phi, split=split, heads=True)

    @jax.jit
    def run(theta, phi):
        context = Context(valid, positions)
        hidden = model.trunk(theta, TOKENS, context, split=split)
        return model.head(theta, phi, hidden, context, split=split)

    seen = look(theta, one_group(phi))
    np.testing.assert_array_equal(seen["hidden"][-1], run(theta, one_group(phi)))
    for layer in range(split):
        query, key, value = (seen[part][layer] for part in ("query", "key", "value"))
        weights, fast = show(query, key, value, seen["mask"])
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
        heads = np.repeat(value, query.shape[2] // key.shape[2], axis=2)
        mixed = np.einsum("bhqk,bkhd->bqhd", weights, heads)
        np.testing.assert_allclose(mixed, fast, rtol=2e-4, atol=1e-5)
        kernel = output_matrix(theta, layer)
        added = mixed.reshape(*TOKENS.shape, -1) @ kernel
        np.testing.assert_allclose(added, seen["attention"][layer], rtol=2e-4, atol=2e-5)


def output_matrix(theta, layer):
    """The first layer is dense, those behind it are mixtures of experts in a stack of their own."""
    stack, own = ("layers_0", layer) if layer == 0 else ("layers_1", layer - 1)
    return np.asarray(theta[stack]["attention"]["o_proj"]["kernel"][own])


def test_the_ordinary_program_is_untouched(monkeypatch):
    model = FAMILIES["llada"]
    theta = jax.eval_shape(model.init, jax.random.key(0))

    def program():
        function = functools.partial(model.trunk, split=3)  # A new one: nothing is cached.
        return jax.jit(function).lower(theta, TOKENS).as_text()

    before = program()
    monkeypatch.setattr(Attention, "sow", lambda *_: None)
    assert program() == before


def test_fast_weights_change_attention_above_them_alone():
    """Feed-forward blocks act on attention from the next layer on, its own matrices at once."""
    model = FAMILIES["llada"]
    theta = random_theta(model)
    both = one_group(random_phi(model, 1))
    none = jax.tree.map(jnp.zeros_like, both)
    look = jax.jit(functools.partial(model.inspect, split=1, heads=True))
    off = look(theta, TOKENS, phi=none)
    for phi, first in ((both | {"attention": none["attention"]}, 2), (both, 1)):
        on = look(theta, TOKENS, phi=phi)
        for layer in range(3):
            a, b = (
                show(x["query"][layer], x["key"][layer], x["value"][layer], None)[0]
                for x in (off, on)
            )
            assert np.array_equal(a, b) == (layer < first)


def test_a_query_that_sees_nothing_attends_to_nothing():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 3, 2, 4))
    mask = jnp.array([[[True, False, True], [False] * 3, [True] * 3]])
    weights = np.asarray(attention_weights(query, key, mask))
    assert (weights[0, :, 1] == 0).all() and (weights[0, :, 0, 1] == 0).all()
    np.testing.assert_allclose(weights[0, :, [0, 2]].sum(-1), 1, rtol=1e-6)


@pytest.fixture(scope="module")
def asked(tokenizer, sentences):
    ((_, (here, _)),) = retrieval.draw(CONFIG, tokenizer, sentences).items()
    return here


@pytest.fixture(scope="module")
def attentive(systems):
    """A system whose memory changes the attention of its last layer."""
    memory = dataclasses.replace(systems[2].memory, target_modules=("attention/q_proj",))
    return systems[2].with_memory(memory)


WRITE = jax.jit(generation.write, static_argnums=0)


def by_loops(system, probe, number, tokenizer, memory, attention="full"):
    """Mean attention on needle and value, [layers, heads, 2], and the share of tokens, [2]."""
    answer = len(probe.response)
    tokens = np.array([*probe.prompt, *[tokenizer.mask_id] * answer])
    start, phi = len(probe.prompt), None
    if memory == "on":
        generator = generation.Generator(system.denoiser, system.inner_loop, DecodeConfig())
        keys = jax.random.fold_in(jax.random.key(0), number)[None]
        prompt = np.zeros((1, 128), np.int32)
        prompt[0, :start] = probe.prompt
        prompts = generation.Prompts(keys, prompt, np.arange(128)[None] < start)
        phi = one_group(WRITE(generator, system.theta, prompts)[0])
    sees = np.ones((len(tokens), len(tokens)), bool)
    if attention == "block_causal":  # Blocks have one token.
        sees = np.tri(len(tokens), dtype=bool)
    seen = jax.jit(functools.partial(system.denoiser.inspect, heads=True, split=1))(
        system.theta, tokens[None], Context(jnp.asarray(sees[None])), phi=phi
    )
    found = np.zeros((2, 2, 2))
    uniform = np.zeros(2)
    for layer in range(2):
        query, key = np.asarray(seen["query"][layer, 0]), np.asarray(seen["key"][layer, 0])
        for head in range(2):
            for at in (start + place - system.denoiser.lookback for place in probe.scored):
                scores = key[:, head] @ query[at, head] / np.sqrt(query.shape[-1])
                weights = np.where(sees[at], np.exp(scores - scores.max()), 0)
                weights /= weights.sum()
                for part, spans in enumerate((probe.needles, probe.values)):
                    columns = [column for span in spans for column in range(*span)]
                    found[layer, head, part] += weights[columns].sum() / len(probe.scored)
                    uniform[part] = len(columns) / sees[at].sum()
    return found, uniform


@pytest.fixture(scope="module")
def shifted(systems, attentive):
    """Likewise of a model whose position i predicts token i + 1."""
    sizes = dataclasses.asdict(systems[0].denoiser.config)
    model = Dream(DreamConfig(**{k: v for k, v in sizes.items() if k in _FIELDS}))
    inner_loop = InnerLoop(model, attentive.memory)
    return System("memdlm", model, random_theta(model), inner_loop)


@pytest.mark.parametrize(
    ("name", "memory", "attention"),
    [("attentive", "off", "block_causal"), ("shifted", "on", "full")],
)
def test_shares_are_those_of_loops(request, asked, tokenizer, name, memory, attention):
    system = request.getfixturevalue(name)
    run = dataclasses.replace(RUN, decode=dataclasses.replace(RUN.decode, attention=attention))
    shares, uniform = retrieval_attention.profile(system, memory, asked, run, tokenizer.pad_id)
    for row in (0, 2):
        expected, share = by_loops(system, asked[row], row, tokenizer, memory, attention)
        np.testing.assert_allclose(shares[row], expected, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(uniform[row], share, rtol=1e-5)


def test_masks_of_the_answer_are_in_no_part(attentive):
    """Even where the prompt fills its columns and its last token is in the part."""
    generator = generation.Generator(attentive.denoiser, None, DecodeConfig(2, 1))
    rows = np.full((1, 8), 7), np.ones((1, 8), bool), np.zeros((1, 2), int), np.full((1, 2), 9)
    batch = Asked(*map(jnp.asarray, (*rows, np.array([2]))))
    parts, scored = jnp.ones((1, 1, 8), bool), jnp.array([[True, False]])
    theta = jax.tree.map(jnp.zeros_like, attentive.theta)  # Attends to everything alike.
    found, uniform = retrieval_attention.shares(generator, theta, None, batch, parts, scored)
    np.testing.assert_allclose(uniform, [[8 / 10]], rtol=1e-6)
    np.testing.assert_allclose(found, np.full((1, 2, 2, 1), 8 / 10), rtol=1e-6)


def test_what_is_reported_is_the_mean_and_the_paired_difference(attentive, asked, tokenizer):
    report = retrieval_attention.evaluate(attentive, asked, RUN, tokenizer.pad_id)
    off, on = (
        retrieval_attention.profile(attentive, memory, asked, RUN, tokenizer.pad_id)[0]
        for memory in ("off", "on")
    )
    assert report["n"] == 3 and report["head_begins"] == 1
    for index, name in enumerate(("needle", "value")):
        part, change = report["parts"][name], (on - off)[..., index]
        np.testing.assert_allclose(part["on"]["mean"], on[..., index].mean(0))
        np.testing.assert_allclose(part["difference"]["mean"], change.mean(0))
        assert (np.array(part["difference"]["mean"][0]) == 0).all()
        assert part["difference"]["p_value"][0] == [1.0, 1.0]
        mean, error = change[:, 1, 0].mean(), change[:, 1, 0].std(ddof=1) / 3**0.5
        assert mean != 0
        expected = statistics.t_p_value(mean, error, 3)
        assert part["difference"]["p_value"][1][0] == pytest.approx(expected)
    plain = retrieval_attention.evaluate(attentive.with_memory(None), asked, RUN, tokenizer.pad_id)
    assert plain["head_begins"] is None and set(plain["parts"]["value"]) == {"uniform", "off"}
    assert plain["parts"]["value"]["off"] == report["parts"]["value"]["off"]


def test_what_cannot_be_looked_at_is_refused(attentive, asked, tokenizer):
    unknown = dataclasses.replace(asked[1], needles=())
    with pytest.raises(ValueError, match=r"probes\[1\] names no needle"):
        retrieval_attention.evaluate(attentive, [asked[0], unknown], RUN, tokenizer.pad_id)
    with pytest.raises(ValueError, match="1 probes are too few"):
        retrieval_attention.evaluate(attentive.with_memory(None), asked[:1], RUN, tokenizer.pad_id)
    closed = System("mdlm", BigramDenoiser(), {})
    with pytest.raises(TypeError, match="BigramDenoiser does not show its attention"):
        retrieval_attention.evaluate(closed, asked, RUN, tokenizer.pad_id)

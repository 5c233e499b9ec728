import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from memdlm_jax.data.needles import NeedleConfig
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation import needles, retrieval, retrieval_answers, statistics
from memdlm_jax.evaluation import systems as library
from memdlm_jax.evaluation.retrieval import RetrievalConfig
from memdlm_jax.evaluation.retrieval_answers import CONDITIONS, Run
from memdlm_jax.evaluation.retrieval_probes import Passage, Probe
from memdlm_jax.evaluation.systems import System
from memdlm_jax.inference import generation
from memdlm_jax.memory import fast_weights
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop
from memdlm_jax.typing import Context
from tests.evaluation import bigram_denoiser
from tests.evaluation.bigram_denoiser import END, MASK, TOKENIZER, BigramDenoiser

TASK = NeedleConfig(split="test", template="short")
CONFIG = RetrievalConfig(TASK, lengths=(128,), num_keys=(2,), episodes=5, attention=False)
RUN = Run(needles.left_to_right(4), max_length=160, batch_size=3)
BIGRAM_RUN = Run(needles.left_to_right(3), max_length=96, batch_size=4)
WRITES = MemoryConfig(
    masking="no_progressive", steps=1, prompt_mask_ratio=0.5, learning_rate=200.0, clip="none",
    adapter="full", layer_fraction=0.5, target_modules=("mlp",),
)  # fmt: skip


@pytest.fixture(scope="module")
def bigrams():
    return System("memdlm", BigramDenoiser(), {}, InnerLoop(BigramDenoiser(), WRITES))


def bigram_probe(key, first, second, filler):
    """``a a (k v1 v2 f) x 20 a k``, the answer being ``v1 v2``."""
    context, question = [key, first, second, filler] * 20, [58, key]
    values = (f"{first} {second}",)
    spelled = " ".join(map(str, context))
    passage = Passage("", spelled, "", values[0], values, all_values=values)
    return Probe(
        passage, [57, 57, *context, *question], (2, 2 + len(context)), [57, 57, *question],
        [first, second, END], (0, 1),
    )  # fmt: skip


def bigram_probes(start, count):
    return [bigram_probe(*range(i, i + 4)) for i in range(start, start + 4 * count, 4)]


@pytest.fixture(scope="module")
def asked():
    return bigram_probes(5, 6)


@pytest.fixture(scope="module")
def others():
    return bigram_probes(31, 6)


@pytest.fixture(scope="module")
def found(bigrams, asked, others):
    return {
        memory: retrieval_answers.answer(bigrams, memory, asked, others, BIGRAM_RUN, TOKENIZER)
        for memory in ("off", "on", "control")
    }


def shown(probe, condition):
    """The prompt of a probe under a condition, and what of it is seen, by hand."""
    first, stop = probe.context
    tokens, seen = list(probe.prompt), [True] * len(probe.prompt)
    if condition == "removed":
        return list(probe.bare), [True] * len(probe.bare)
    for column in range(first, stop):
        if condition == "masked":
            tokens[column] = MASK
        if condition == "blind":
            seen[column] = False
    return tokens, seen


WRITE = jax.jit(generation.write, static_argnums=0)


def memory_of(system, ids, number, seed=0):
    """The memory of one row, written alone, its padding behind it."""
    keys = jax.random.fold_in(jax.random.key(seed), number)[None]
    generator = generation.Generator(system.denoiser, system.inner_loop, DecodeConfig())
    tokens = np.zeros((1, 128), np.int32)
    tokens[0, : len(ids)] = ids
    valid = np.arange(128)[None] < len(ids)
    prompts = generation.Prompts(keys, tokens, valid)
    return WRITE(generator, system.theta, prompts, system.learned)[0]


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("memory", ["off", "on", "control"])
def test_a_denoiser_of_known_knowledge_retrieves_where_it_can(found, asked, condition, memory):
    """From the context while it is in view, from its own memory always, from another's never."""
    right = [o.correct for o in retrieval.outcomes(found[memory][condition], asked)]
    assert right == [condition == "full" or memory == "on"] * len(asked)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("memory", ["off", "on", "control"])
def test_scores_are_those_of_loops(bigrams, found, asked, others, condition, memory):
    answers = found[memory][condition]
    for row in (0, 3, 5):
        probe, table = asked[row], None
        if memory != "off":
            prompt = (asked if memory == "on" else others)[row].prompt
            phi = memory_of(bigrams, prompt, row)
            table = np.asarray(phi["mlp"]["up_proj"]["delta"].W[0, 0])
        prompt, seen = shown(probe, condition)
        seen = [*seen, True, True, True]
        at_once = left_to_right = 0.0
        for place in (0, 1):
            at, label = len(prompt) + place, probe.response[place]
            masked = [*prompt, MASK, MASK, MASK]
            at_once += bigram_denoiser.log_probability(masked, seen, at, label, table)
            masked[len(prompt) : at] = probe.response[:place]
            left_to_right += bigram_denoiser.log_probability(masked, seen, at, label, table)
        np.testing.assert_allclose(answers.at_once[row], at_once, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(answers.left_to_right[row], left_to_right, rtol=1e-3, atol=1e-5)
        assert answers.tokens[row] == 2


def test_what_a_row_knows_does_not_hang_on_its_neighbours(bigrams, asked, found):
    changed = [asked[0], *bigram_probes(35, 2), asked[3]]
    said = retrieval_answers.answer(bigrams, "on", changed, (), BIGRAM_RUN, TOKENIZER, ["removed"])
    here, there = said["removed"], found["on"]["removed"]
    for row in (0, 3):
        assert here.texts[row] == there.texts[row]
        np.testing.assert_allclose(here.at_once[row], there.at_once[row], rtol=1e-5)


def test_the_context_alone_can_be_written(bigrams, asked):
    run = dataclasses.replace(BIGRAM_RUN, written="context")
    said = retrieval_answers.answer(bigrams, "on", asked, (), run, TOKENIZER, ["removed"])
    table = memory_of(bigrams, asked[1].prompt[2:82], 1)["mlp"]["up_proj"]["delta"].W[0, 0]
    tokens = [*asked[1].bare, MASK, MASK, MASK]
    first = bigram_denoiser.log_probability(tokens, [True] * 7, 4, asked[1].response[0], table)
    second = bigram_denoiser.log_probability(tokens, [True] * 7, 5, asked[1].response[1], table)
    np.testing.assert_allclose(said["removed"].at_once[1], first + second, rtol=1e-3)


def test_one_compilation_for_each_shape(bigrams, asked):
    before = retrieval_answers.ask._cache_size()
    for seed in (0, 1):
        run = dataclasses.replace(BIGRAM_RUN, seed=seed, batch_size=2)
        # Masked and hidden contexts have the shape of the whole.
        retrieval_answers.answer(bigrams, "off", asked, (), run, TOKENIZER)
    assert retrieval_answers.ask._cache_size() == before + 2


def test_rows_that_cannot_be_asked_are_refused(bigrams, asked, others):
    def answer(memory="off", system=bigrams, rows=asked, controls=(), hide=CONDITIONS, **changes):
        run = dataclasses.replace(BIGRAM_RUN, **changes)
        retrieval_answers.answer(system, memory, rows, controls, run, TOKENIZER, hide)

    with pytest.raises(ValueError, match=r"others\[1\] holds a value of probes\[1\]"):
        answer("control", controls=[others[0], *asked[1:]])
    with pytest.raises(ValueError, match="5 others: one for each of 6 probes"):
        answer("control", controls=others[1:])
    with pytest.raises(ValueError, match="memdlm has no memory: memory='on' must be 'off'"):
        answer("on", system=bigrams.with_memory(None))
    with pytest.raises(ValueError, match="probes is empty"):
        answer(rows=[])
    with pytest.raises(ValueError, match=r"decode.length=2 must be at least 3"):
        answer(decode=needles.left_to_right(2))
    with pytest.raises(
        ValueError, match=r"prompt has 84 tokens with its context full.* at most 83"
    ):
        answer(max_length=86)
    with pytest.raises(ValueError, match=r"to be written has 84 tokens; .* max_length=80"):
        answer("on", hide=["removed"], max_length=80)


def test_long_contexts_are_written_in_pieces_and_asked_without(bigrams, asked):
    memory = dataclasses.replace(WRITES, prompt_chunk=16)
    system = bigrams.with_memory(memory)
    run = dataclasses.replace(BIGRAM_RUN, max_length=16)
    off, on = (
        retrieval_answers.answer(system, memory, asked[:2], (), run, TOKENIZER, ["removed"])
        for memory in ("off", "on")
    )
    assert (on["removed"].left_to_right > off["removed"].left_to_right + 1).all()


def test_memory_is_not_written_on_while_decoding(bigrams, asked, found):
    writes_on = bigrams.with_memory(dataclasses.replace(WRITES, adapt_every=1))
    said = retrieval_answers.answer(writes_on, "on", asked, (), BIGRAM_RUN, TOKENIZER, ["removed"])
    assert said["removed"].texts == found["on"]["removed"].texts


# A transformer, text and a tokenizer.


@pytest.fixture(scope="module")
def drawn(tokenizer, sentences):
    ((_, both),) = retrieval.draw(CONFIG, tokenizer, sentences).items()
    return both


@pytest.mark.parametrize(
    ("which", "memory", "condition"),
    [(1, "off", "removed"), (2, "on", "full")],
)
def test_replies_are_those_that_the_systems_give(
    systems, tokenizer, drawn, which, memory, condition
):
    """The bare question, and the whole prompt, to a system as it is otherwise asked."""
    here, others = drawn
    said = retrieval_answers.answer(
        systems[which], memory, here, others, RUN, tokenizer, [condition]
    )
    prompts = [p.bare if condition == "removed" else p.prompt for p in here]
    plain = library.reply(
        systems[which], tokenizer, prompts, RUN.decode, seed=RUN.seed, max_length=160, batch_size=3
    )
    assert said[condition].texts == plain.texts
    assert len(set(plain.texts)) > 1


def test_scores_of_a_transformer_are_those_of_single_rows(systems, tokenizer, drawn):
    here, others = drawn
    system, denoiser, mask = systems[2], systems[2].denoiser, tokenizer.mask_id
    said = retrieval_answers.answer(system, "on", here, others, RUN, tokenizer)

    @jax.jit
    def logits(tokens, seen, phi):
        theta, context = system.theta, Context(seen)
        hidden = denoiser.trunk(theta, tokens, context, split=1)
        last = fast_weights.head_with_memory(denoiser, theta, phi, hidden, context, split=1)
        return denoiser.readout(system.theta, last)[0]

    for row, condition in itertools.product((1, 4), CONDITIONS):
        probe = here[row]
        phi = memory_of(system, probe.prompt, row)
        first, stop = probe.context
        prompt = np.array(probe.bare if condition == "removed" else probe.prompt)
        seen = np.arange(144) < len(prompt) + len(probe.response)  # All rows in one shape.
        if condition == "masked":
            prompt[first:stop] = mask
        if condition == "blind":
            seen[first:stop] = False
        expected = np.zeros(2)
        for place in probe.scored:
            for i, known in enumerate((0, place)):
                answer = [*probe.response[:known], *[mask] * (len(probe.response) - known)]
                tokens = np.zeros((1, 144), np.int32)
                tokens[0, : len(prompt) + len(answer)] = [*prompt, *answer]
                log_p = jax.nn.log_softmax(logits(tokens, seen[None], phi))
                expected[i] += log_p[len(prompt) + place, probe.response[place]]
        got = said[condition].at_once[row], said[condition].left_to_right[row]
        np.testing.assert_allclose(got, expected, rtol=2e-4)


@pytest.fixture(scope="module")
def measured(systems, tokenizer, sentences):
    config = dataclasses.replace(CONFIG, num_keys=(2, 3), conditions=("full", "removed"))
    return retrieval.evaluate(
        systems[1:], config, tokenizer, sentences, RUN.decode, max_length=160, batch_size=3
    )


def test_what_is_reported_is_what_was_found(measured, systems, tokenizer, drawn):
    here, others = drawn
    found = {
        memory: retrieval_answers.answer(
            systems[2], memory, here, others, RUN, tokenizer, ["full", "removed"]
        )
        for memory in ("off", "on", "control")
    }
    cell = measured["cells"][0]
    assert (cell["length"], cell["num_keys"], cell["n"]) == (128, 2, 5)
    assert cell["value_of_context_floor"] == 1 / 2
    assert cell["context_tokens"] == np.mean([p.context[1] - p.context[0] for p in here])
    said = cell["systems"]["memdlm"]
    for condition, memory in itertools.product(("full", "removed"), found):
        answers, numbers = found[memory][condition], said["conditions"][condition][memory]
        assert numbers["accuracy"]["n"] == sum(p["n"] for p in numbers["by_depth"]) == 5
        for name in ("at_once", "left_to_right"):
            mean = sum(getattr(answers, name)) / sum(answers.tokens)
            assert numbers[name]["log_probability"] == pytest.approx(mean, rel=1e-6)
        assert said["samples"][0][memory][condition] == answers.texts[0]
    compared = {(c["condition"], c["first"], c["second"]): c for c in said["comparisons"]}
    assert len(compared) == 2 * 3
    one = compared["removed", "control", "on"]["at_once"]
    both = (found[m]["removed"].at_once for m in ("on", "control"))
    change = [a - b for a, b in zip(*both, strict=True)]
    error = np.std(change, ddof=1) / 5**0.5
    assert one["difference"] == pytest.approx(np.mean(change), rel=1e-6)
    assert one["standard_error"] == pytest.approx(error, rel=1e-6)
    assert one["p_value"] == statistics.t_p_value(one["difference"], one["standard_error"], 5)
    assert one["p_value"] <= one["p_adjusted"] <= 1 and one["interval"][0] < one["difference"]


def test_what_has_no_room_is_refused_before_anything_is_asked(
    systems, bigrams, tokenizer, sentences, monkeypatch
):
    def ask(*_):
        raise AssertionError("asked")

    def evaluate(who=systems[0], attention=False, **changes):
        config = dataclasses.replace(CONFIG, lengths=(128, 150), attention=attention)
        settings = {"decode": RUN.decode, "max_length": 160} | changes
        retrieval.evaluate([systems[1], who], config, tokenizer, sentences, **settings)

    monkeypatch.setattr(retrieval_answers, "answer", ask)
    with pytest.raises(AssertionError, match="asked"):
        evaluate()
    with pytest.raises(ValueError, match="must have at most 136"):
        evaluate(max_length=140)
    with pytest.raises(ValueError, match=r"decode.length=2 must be at least 3"):
        evaluate(decode=needles.left_to_right(2))
    with pytest.raises(TypeError, match="BigramDenoiser does not show its attention"):
        evaluate(bigrams, attention=True)


def test_systems_without_memory_are_asked_once(measured):
    for part in (*(c["systems"] for c in measured["cells"]), measured["pooled"]):
        assert set(part["memdlm_train_only"]["conditions"]["full"]) == {"off"}
        assert part["memdlm_train_only"]["comparisons"] == []
        assert (
            part["memdlm_train_only"]["conditions"]["removed"]["off"]
            == (part["memdlm"]["conditions"]["removed"]["off"])
        )


def test_cells_are_pooled_and_everything_is_json(measured):
    pooled = measured["pooled"]["memdlm"]["conditions"]["removed"]["on"]
    cells = [c["systems"]["memdlm"]["conditions"]["removed"]["on"] for c in measured["cells"]]
    assert pooled["accuracy"]["n"] == 10
    mean = np.mean([c["at_once"]["log_probability"] for c in cells])
    assert pooled["at_once"]["log_probability"] == pytest.approx(mean)
    assert json.loads(json.dumps(measured))["config"]["written"] == "prompt"


def test_mc_nemar_is_told_who_was_right(asked, found):
    """On is always right on what is removed, off and control never."""
    summary = retrieval.summarise(found, asked)
    compared = {(c["condition"], c["first"], c["second"]): c for c in summary["comparisons"]}
    for first in ("off", "control"):
        accuracy = compared["removed", first, "on"]["accuracy"]
        assert (accuracy["only_first"], accuracy["only_second"]) == (0, 6)
        assert accuracy["difference"] == 1.0 and accuracy["p_value"] == 2 / 2**6
    assert compared["full", "off", "on"]["accuracy"]["p_value"] == 1.0
    raw = [c["accuracy"]["p_value"] for c in summary["comparisons"]]
    adjusted = [c["accuracy"]["p_adjusted"] for c in summary["comparisons"]]
    assert adjusted == statistics.holm(raw)

import dataclasses

import pytest

from memdlm_jax.data.chat import ChatTemplate
from memdlm_jax.data.needles import NEEDLE, NeedleConfig, NeedleTask
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.evaluation import retrieval_probes as probes
from memdlm_jax.evaluation.retrieval_probes import Passage
from memdlm_jax.evaluation.systems import prompt_ids

PASSAGE = Passage(
    before="Read this. ", context="The cat sat on 12 mats. The bird flew.", after="\nHow many?",
    response=" 12 mats", values=("12",), prefix=" It sat on", needles=("The cat sat on 12 mats.",),
)  # fmt: skip
TASKS = {
    "short": NeedleConfig(length=160, num_keys=2, template="short"),
    "ruler": NeedleConfig(length=220, num_keys=2),
    "several": NeedleConfig(length=480, num_keys=2, num_values=3, value_digits=5, key_words=2),
    "repeat": NeedleConfig(length=260, num_keys=3, haystack="repeat"),
}


@pytest.fixture(scope="module", params=["turns", "template"])
def ids_of(request, tokenizer):
    """The tokenizer as it is, and one whose template renders the conversation and trims it."""
    if request.param == "turns":
        return tokenizer
    source = (
        "{% for m in messages %}<|user|>{{ m['content'] | trim }}<|eos|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return Tokenizer(tokenizer._backend, tokenizer.special, ChatTemplate(source))


@pytest.mark.parametrize("name", TASKS)
def test_parts_of_an_episode_are_found_among_its_tokens(ids_of, sentences, name):
    task = NeedleTask(TASKS[name], ids_of, sentences)
    for index in range(4):
        episode = task.episode(0, index)
        passage = probes.of_episode(episode)
        probe = probes.encode(passage, ids_of)
        assert probe.prompt == prompt_ids(ids_of, episode.example("e"), 500)

        def spelled(span, probe=probe):
            return ids_of.decode(probe.prompt[slice(*span)], skip_special=False)

        assert spelled(probe.context).strip() == passage.context
        needles = [NEEDLE.format(key=episode.key, value=value) for value in episode.values]
        assert [spelled(span).strip() for span in probe.needles] == needles
        assert tuple(spelled(span) for span in probe.values) == episode.values
        answer = ids_of.decode([probe.response[i] for i in probe.scored])
        assert answer == "".join(episode.values)
        assert episode.key not in passage.before and "magic" not in passage.context[:20]
        bare = ids_of.decode(probe.bare, skip_special=False)
        assert episode.key in bare and not any(value in bare for value in episode.all_values)
        assert (
            (TASKS[name].template == "ruler")
            == ("What" in bare)
            == ("special magic" in passage.before)
        )


def test_conditions_take_the_context_away(tokenizer):
    probe = probes.encode(PASSAGE, tokenizer)
    first, stop = probe.context
    full, removed, masked, blind = (
        probes.asked(probe, condition, tokenizer.mask_id)
        for condition in ("full", "removed", "masked", "blind")
    )
    assert full == probes.Question(probe.prompt)
    opened = [tokenizer.user_id, *tokenizer.encode("Read this. \nHow many?"), tokenizer.eos_id]
    question = [tokenizer.assistant_id, *tokenizer.encode(" It sat on")]
    assert removed == probes.Question([*opened, *question])
    assert blind == probes.Question(probe.prompt, (first, stop))
    changed = [
        i
        for i, pair in enumerate(zip(masked.tokens, probe.prompt, strict=True))
        if len({*pair}) > 1
    ]
    assert changed == list(range(first, stop)) and masked.invisible == (0, 0)
    assert {masked.tokens[i] for i in changed} == {tokenizer.mask_id}
    assert probes.written(probe, "prompt") == probe.prompt
    assert probes.written(probe, "context") == probe.prompt[first:stop]


def test_a_turn_is_there_even_if_nothing_is_left_of_it(tokenizer):
    probe = probes.encode(dataclasses.replace(PASSAGE, before="", after=""), tokenizer)
    question = tokenizer.encode(" It sat on")
    assert probe.bare == [tokenizer.user_id, tokenizer.eos_id, tokenizer.assistant_id, *question]


def test_the_context_is_told_from_the_same_words_elsewhere(tokenizer):
    passage = dataclasses.replace(
        PASSAGE, before="Mats: ", context="mats 12", after=" mats 12?", needles=("mats 12",)
    )
    probe = probes.encode(passage, tokenizer)
    before = tokenizer.decode(probe.prompt[1 : probe.context[0]])
    assert before.rstrip() == "Mats:"
    assert tokenizer.decode(probe.prompt[probe.context[1] : -4]).startswith(" mats 12?")
    assert probe.context[0] <= probe.values[0][0] < probe.context[1]


def test_characters_of_several_bytes_have_columns(tokenizer):
    text = "a désert 12 日本 13."
    ids = tokenizer.encode(text)
    for part in ("désert", "12", "日本", "13", "."):
        at = text.index(part)
        first, stop = probes.columns(tokenizer, ids, at, at + len(part))
        assert tokenizer.decode(ids[first:stop]).strip() == part


def test_a_passage_that_holds_an_asked_value_is_no_control():
    other = dataclasses.replace(PASSAGE, context="The Cat sat.", needles=())
    assert not probes.conflict(PASSAGE, other)
    assert probes.conflict(PASSAGE, PASSAGE)
    named = dataclasses.replace(PASSAGE, response=" cat", values=("cat",), needles=())
    assert probes.conflict(named, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": " "}, "context is empty"),
        ({"values": ()}, "values is empty"),
        ({"needles": ("a", "b")}, "needles has 2 sentences; one for each of the 1 values"),
    ],
)
def test_bad_passages_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PASSAGE, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"needles": ("A dog sat on 12 mats.",)}, "needles 'A dog sat .* is not found in"),
        ({"needles": ("The bird flew.",)}, "'The bird flew.', which must hold its value '12'"),
        ({"response": " 13"}, "values in the response, '12' is not found"),
    ],
)
def test_parts_that_are_not_there_are_named(tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        probes.encode(dataclasses.replace(PASSAGE, **changes), tokenizer)

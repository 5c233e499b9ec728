import dataclasses
import json

import numpy as np
import pytest

from experiments.configs import evaluate as evaluate_config
from experiments.configs import quickstart as quickstart_config
from memdlm_jax.data.needles import NeedleConfig, NeedleTask, chance_floor
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation import needles
from memdlm_jax.evaluation.needles import NeedleSuite, Outcome

SUITE = NeedleSuite(
    NeedleConfig(split="test", template="short"), lengths=(128, 192), num_keys=(2, 3), episodes=12
)


def first_value(episodes):
    """Answer with the first value of the haystack, whatever was asked."""
    return [f" {episode.all_values[0]}" for episode in episodes]


def nothing(episodes):
    return ["" for _ in episodes]


def test_oracle_reads_every_episode(tokenizer, sentences):
    tasks = [
        NeedleConfig(split="test"),
        NeedleConfig(split="test", template="short", haystack="repeat"),
        NeedleConfig(split="test", num_values=3, key_words=2, value_digits=7),
    ]
    for task in tasks:
        suite = NeedleSuite(task, lengths=(600,), num_keys=(1, 3), episodes=5)
        for episodes in needles.draw_episodes(suite, tokenizer, sentences).values():
            assert needles.oracle(episodes) == [", ".join(e.values) for e in episodes]


def test_what_evaluate_says_of_known_answerers(tokenizer, sentences):
    answerers = {"oracle": needles.oracle, "first": first_value, "nothing": nothing}
    result = needles.evaluate(SUITE, tokenizer, sentences, answerers)
    assert [(c["length"], c["num_keys"]) for c in result["cells"]] == [
        (128, 2), (128, 3), (192, 2), (192, 3)
    ]  # fmt: skip
    for cell in result["cells"]:
        assert (cell["n"], cell["oracle"]) == (12, 1.0)
        assert cell["value_of_context_floor"] == 1 / cell["num_keys"]
        assert cell["random_number_floor"] == 1 / 900
        of = cell["systems"]
        assert of["oracle"]["accuracy"]["value"] == 1.0
        assert of["first"]["in_context"]["value"] == 1.0
        assert of["first"]["bound_if_in_context"]["value"] == of["first"]["accuracy"]["value"] < 1
        assert of["nothing"]["in_context"]["value"] == 0.0
        assert of["nothing"]["bound_if_in_context"]["value"] is None
        assert sum(part["n"] for part in of["first"]["by_depth"]) == 12
    pooled = {(c["first"], c["second"]): c for c in result["comparisons"]}
    against = pooled["oracle", "nothing"]
    assert (against["n"], against["only_first"], against["only_second"]) == (48, 48, 0)
    assert against["difference"] == -1.0 and against["p_adjusted"] < 1e-9
    assert json.loads(json.dumps(result))["suite"]["episodes"] == 12


def test_episodes_are_the_same_for_whoever_asks(tokenizer, sentences):
    seen = []

    def remember(episodes):
        seen.append([episode.prompt for episode in episodes])
        return nothing(episodes)

    suite = dataclasses.replace(SUITE, lengths=(128,), num_keys=(2,))
    needles.evaluate(suite, tokenizer, sentences, {"a": remember, "b": remember})
    assert seen[0] == seen[1]
    longer = needles.draw_episodes(dataclasses.replace(suite, episodes=14), tokenizer, sentences)
    assert [e.prompt for e in next(iter(longer.values()))[:12]] == seen[0]


def test_no_two_cells_share_a_question(tokenizer, sentences):
    suite = dataclasses.replace(SUITE, lengths=(128, 160, 192), num_keys=(2, 3))
    cells = needles.draw_episodes(suite, tokenizer, sentences)
    asked = [{(e.key, e.value) for e in episodes} for episodes in cells.values()]
    assert len(set.union(*asked)) == sum(map(len, asked)) == 6 * 12
    first = NeedleTask(suite.cells[0], tokenizer, sentences)
    assert next(iter(cells.values())) == [first.episode(suite.seed, i) for i in range(12)]


def test_depths_at_the_edges_are_counted():
    outcomes = [Outcome("", 1.0, True, depth) for depth in (0.0, 0.199, 0.2, 0.999, 1.0)]
    assert [part["n"] for part in needles.summarise(outcomes)["by_depth"]] == [2, 1, 0, 0, 2]


def test_partly_right_is_not_correct(tokenizer, sentences):
    suite = NeedleSuite(NeedleConfig(num_values=2), lengths=(300,), num_keys=(1,), episodes=4)
    (episodes,) = needles.draw_episodes(suite, tokenizer, sentences).values()
    summary = needles.summarise(needles.evaluate_cell(episodes, first_value))
    assert summary["mean_score"] == 0.5 and summary["accuracy"]["value"] == 0.0


def test_an_answer_longer_than_the_window_is_refused_before_anything_is_asked(tokenizer, sentences):
    def ask(episodes):
        raise AssertionError("asked")

    task = dataclasses.replace(SUITE.task, num_values=2)
    suite = dataclasses.replace(SUITE, task=task, lengths=(300,))
    answer = needles.draw_episodes(suite, tokenizer, sentences)[suite.cells[-1]][0].response
    least = len(tokenizer.encode(answer))
    needles.evaluate(suite, tokenizer, sentences, {"oracle": needles.oracle}, window=least)
    with pytest.raises(ValueError, match=rf"decode\.length={least - 1} must be at least {least}"):
        needles.evaluate(suite, tokenizer, sentences, {"a": ask}, window=least - 1)


def test_the_floor_is_that_of_guessing_all_asked_values(tokenizer, sentences):
    """Two values at random of the four in the context, in any order: one guess in six."""
    rng = np.random.default_rng(0)
    task = NeedleConfig(num_values=2, length=300, num_keys=2)
    suite = NeedleSuite(task, lengths=(300,), num_keys=(2,), episodes=400)
    (episodes,) = needles.draw_episodes(suite, tokenizer, sentences).values()
    guesses = [", ".join(rng.choice(e.all_values, 2, replace=False)) for e in episodes]
    accuracy = needles.summarise(needles.evaluate_cell(episodes, lambda _: guesses))["accuracy"]
    assert chance_floor(task) == 1 / 6
    assert accuracy["interval"][0] < 1 / 6 < accuracy["interval"][1] < 1 / 2
    assert needles.guessing_floor(task) == 2 / (900 * 899)


def test_systems_answer_in_text(systems, tokenizer, sentences):
    suite = dataclasses.replace(SUITE, lengths=(128,), num_keys=(2,), episodes=3)
    (episodes,) = needles.draw_episodes(suite, tokenizer, sentences).values()
    config = DecodeConfig(length=4, block_length=4, steps=2)
    replies = needles.answerer(systems[0], tokenizer, config, max_length=160)(episodes)
    assert len(replies) == 3 and all("<|" not in reply for reply in replies)
    small = needles.answerer(systems[0], tokenizer, config, max_length=100)
    with pytest.raises(ValueError, match="does not fit max_length=100: prompt_too_long"):
        small(episodes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"episodes": 0}, "needles.episodes=0 must be at least 1"),
        ({"lengths": ()}, "needles.lengths is empty"),
        ({"num_keys": ()}, "needles.num_keys is empty"),
        ({"lengths": (128, 128)}, r"needles.lengths=\(128, 128\) must not repeat a value"),
        ({"seed": -1}, "needles.seed=-1 must be at least 0"),
    ],
)
def test_bad_suites_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SUITE, **settings)


def test_a_reply_for_every_episode(tokenizer, sentences):
    suite = dataclasses.replace(SUITE, lengths=(128,), num_keys=(2,))
    with pytest.raises(ValueError, match="shorter"):
        needles.evaluate(suite, tokenizer, sentences, {"a": lambda episodes: [""]})


def test_every_default_decodes_answers_from_left_to_right():
    """One sampler for training's probe, the comparison and the quickstart: numbers compare."""
    sampler = needles.left_to_right(4)
    assert sampler.num_blocks == sampler.length == 4
    for config in (evaluate_config.get_config(), quickstart_config.get_config().evaluate):
        assert DecodeConfig(**config.decode.to_dict()) == sampler

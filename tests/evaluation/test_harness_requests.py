import pytest

from memdlm_jax.diffusion.samplers import SAMPLERS, DecodeConfig
from memdlm_jax.evaluation.harness.requests import before, settings_of, windows

ONE_BLOCK = {"block_length": 0}


def test_windows_score_every_token_once_with_all_the_context_there_is():
    for length in range(1, 23):
        found = windows(range(length), 5)
        assert [token for _, scored in found for token in scored] == list(range(length))
        for i, (context, scored) in enumerate(found):
            both = context + scored
            assert both == list(range(both[0], both[-1] + 1)) and len(both) == min(5, length)
            assert not context or i == len(found) - 1


def test_a_task_is_decoded_as_the_public_harness_does():
    task = {"do_sample": False, "temperature": 0.0, "max_gen_toks": 30, "until": []}
    config, limit, until = settings_of(ONE_BLOCK, task)
    assert config == DecodeConfig(30, block_length=0) and (limit, until) == (30, ())
    assert config.steps_per_block == config.block_size == 30
    assert settings_of(ONE_BLOCK, {})[0].length == 256
    for name in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert settings_of(ONE_BLOCK, {name: 7})[1] == 7


def test_blocks_are_whole():
    config, limit, _ = settings_of({"block_length": 32, "threshold": 0.9}, {"max_gen_toks": 50})
    assert (config.length, limit, config.threshold) == (64, 50, 0.9)
    given = {"max_gen_toks": 16, "block_length": 4, "steps": 8, "stop": [9]}
    assert settings_of(ONE_BLOCK, given)[0] == DecodeConfig(16, 4, 8, stop=(9,))
    fast = {"threshold": 0.9, "cache": "dual", "block_length": 32}
    assert settings_of(fast, {"max_gen_toks": 128})[0] == SAMPLERS["fast"]


@pytest.mark.parametrize(
    ("given", "temperature"),
    [
        ({"temperature": 0.7}, 0.7),
        ({"temperature": 1, "do_sample": False}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.2, "num_beams": 1}, 0.2),
        ({}, 0.0),
    ],
)
def test_temperature(given, temperature):
    assert settings_of(ONE_BLOCK, given)[0].temperature == temperature


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_gen_toks": 0}, "gen_kwargs max_gen_toks=0 must be a whole number of 1 or more"),
        ({"num_beams": 4}, "gen_kwargs num_beams=4 must be 1"),
        ({"typical_p": 0.3}, "gen_kwargs typical_p=0.3 is unknown; known are alignment, "),
        ({"length": 3}, "gen_kwargs length=3 is unknown"),
        ({"max_gen_toks": 30, "steps": 60}, r"max_gen_toks=30: decode\.steps=60 must be at most"),
        ({"temperature": "hot"}, r"max_gen_toks=256: decode\.temperature='hot' must be a number"),
    ],
)
def test_wrong_settings_are_named(given, said):
    with pytest.raises(ValueError, match=said):
        settings_of(ONE_BLOCK, given)


def test_a_text_ends_before_the_first_of_its_ends():
    assert settings_of(ONE_BLOCK, {"until": "Q:"})[2] == ("Q:",)
    assert settings_of(ONE_BLOCK, {"until": ["", "\n\n", "Q:"]})[2] == ("\n\n", "Q:")
    assert before("a b\n\nc Q: d", ("Q:", "\n\n")) == "a b"
    assert before("a Q: b\n\nc", ("Q:", "\n\n")) == "a "
    assert before("a", ()) == "a"

"""The pretraining mixture: a pure function of the step, with batches of two kinds."""

import itertools

import numpy as np
import pytest

from memdlm_jax.data import pretraining
from memdlm_jax.data.pretraining import (
    ANSWER_SLOTS,
    MOST_EXTRA_EOS,
    PretrainingConfig,
    PretrainingMix,
)

LENGTHS = (160, 224)
CONFIG = PretrainingConfig(
    text_length=24, text_rows=5, needle_lengths=LENGTHS, needle_tokens=500, max_keys=2
)
STREAM = np.arange(1000, dtype=np.int32)


@pytest.fixture(scope="module")
def make(tokenizer, sentences):
    def with_settings(**settings):
        fields = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
        config = PretrainingConfig(**fields | settings)
        return PretrainingMix(config, tokenizer, STREAM, sentences)

    return with_settings


@pytest.fixture(scope="module")
def mix(make):
    return make(needle_share=0.25)


def is_needle(batch):
    return batch.tokens.shape[1] != CONFIG.text_length


def same(a, b):
    return all(
        np.array_equal(getattr(a, n), getattr(b, n)) for n in ("tokens", "maskable", "valid")
    )


def test_a_batch_is_a_pure_function_of_config_and_step(mix, make):
    again = make(needle_share=0.25)
    for step in (7, 3, 11, 4):
        assert same(mix.batch_at(step), again.batch_at(step))
    streamed = list(itertools.islice(mix.iterate(2), 6))
    assert all(same(batch, again.batch_at(2 + i)) for i, batch in enumerate(streamed))


def test_steps_and_seeds_differ(mix, make):
    other = make(needle_share=0.25, seed=1)
    for step in (0, 3):
        assert not same(mix.batch_at(step), other.batch_at(step))
    assert not same(mix.batch_at(0), mix.batch_at(1))
    assert not same(mix.batch_at(3), mix.batch_at(3 + 4 * len(LENGTHS)))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.4, 1.0])
def test_share_of_needle_batches(make, share):
    """Exact at every prefix to within one batch, not only on average; lengths take turns."""
    kinds = [
        is_needle(batch) for batch in itertools.islice(make(needle_share=share).iterate(0), 20)
    ]
    for end in range(1, 21):
        assert abs(sum(kinds[:end]) - share * end) < 1
    lengths = [
        batch.tokens.shape[1]
        for batch in itertools.islice(make(needle_share=share).iterate(0), 20)
        if is_needle(batch)
    ]
    assert lengths == [LENGTHS[i % 2] for i in range(len(lengths))]


def test_opens_with_needles_only(make):
    """Then the ordinary mixture starts from its beginning; lengths go on taking turns."""
    opened, plain = make(needle_share=0.4, needle_only_batches=3), make(needle_share=0.4)
    batches = [opened.batch_at(step) for step in range(13)]
    kinds = [is_needle(batch) for batch in batches]
    assert kinds[:3] == [True] * 3
    assert kinds[3:] == [is_needle(plain.batch_at(step)) for step in range(10)]
    lengths = [batch.tokens.shape[1] for batch in batches if is_needle(batch)]
    assert lengths == [LENGTHS[i % 2] for i in range(7)]


def test_text_rows_are_windows_of_the_stream(mix):
    batch = mix.batch_at(0)
    assert batch.tokens.shape == (5, 24) and batch.tokens.dtype == np.int32
    assert (np.diff(batch.tokens, axis=1) == 1).all()
    assert batch.maskable.all() and batch.valid.all()
    starts = np.concatenate([mix.batch_at(step).tokens[:, 0] for step in range(0, 200, 4)])
    assert starts.min() < 50 and starts.max() > 1000 - 24 - 50


@pytest.fixture(scope="module")
def needle_batches(make):
    mix = make(needle_share=1.0)
    return [mix.batch_at(step) for step in range(8)]


def test_needle_rows_fit_their_length_and_budget(needle_batches):
    for batch in needle_batches:
        rows, length = batch.tokens.shape
        assert rows == 500 // length
        assert batch.tokens.dtype == np.int32
        # Valid tokens come first; the row is filled to the few ends that may be added.
        ends = batch.valid.sum(-1)
        np.testing.assert_array_equal(batch.valid, np.arange(length) < ends[:, None])
        assert (ends > 0.85 * length).all()


def test_answers_are_masked_whole_with_their_ends(needle_batches, tokenizer):
    """What is maskable: the value asked for, then one to six ends, up to the padding."""
    extra = set()
    for batch in needle_batches:
        for tokens, maskable, valid in zip(batch.tokens, batch.maskable, batch.valid, strict=True):
            answer = tokens[maskable].tolist()
            first = np.flatnonzero(maskable)[0]
            assert maskable[first : valid.sum()].all() and not maskable[valid.sum() :].any()
            assert (tokens[~valid] == tokenizer.pad_id).all()
            ends = answer.count(tokenizer.eos_id)
            assert answer[-ends:] == [tokenizer.eos_id] * ends
            extra.add(ends - 1)
            value = tokenizer.decode(answer[:-ends])
            prompt = tokenizer.decode(tokens[:first].tolist())
            assert f" is:{value}." in prompt
            assert prompt.rstrip().endswith("mentioned in the provided text is")
    assert extra == set(range(MOST_EXTRA_EOS + 1))


def test_targets_fit_the_capacity(mix, needle_batches):
    assert mix.target_capacity(CONFIG.text_length) == CONFIG.text_length
    for batch in needle_batches:
        capacity = mix.target_capacity(batch.tokens.shape[1])
        assert capacity == ANSWER_SLOTS
        assert batch.maskable.sum(-1).max() <= capacity


def test_an_answer_beyond_the_capacity_is_refused(make, monkeypatch):
    monkeypatch.setattr(pretraining, "ANSWER_SLOTS", 6)
    with pytest.raises(ValueError, match="target slots of 6"):
        make(needle_share=1.0).batch_at(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_length": 0}, "text_length=0"),
        ({"text_rows": 1.5}, "text_rows=1.5"),
        ({"max_keys": 0}, "max_keys=0"),
        ({"needle_only_batches": -1}, "needle_only_batches=-1"),
        ({"needle_share": 1.5}, r"needle_share=1.5 must lie in \[0, 1\]"),
        ({"needle_share": float("nan")}, "needle_share=nan"),
        ({"needle_lengths": (256, 512)}, r"needle_lengths=\(256, 512\) must not hold text_length"),
        ({"needle_lengths": ()}, "needle_lengths is empty, but needle_share=0.5"),
        (
            {"needle_lengths": (), "needle_share": 0.0, "needle_only_batches": 3},
            "needle_only_batches=3 ask for needle batches",
        ),
        ({"needle_tokens": 511}, "needle_tokens=511 must be at least the longest"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PretrainingConfig(**settings)


def test_text_and_needles_must_have_room(make, tokenizer, sentences):
    with pytest.raises(ValueError, match="the text has 24 tokens, it must be longer than one row"):
        PretrainingMix(CONFIG, tokenizer, STREAM[:24], sentences)
    with pytest.raises(ValueError, match="needle_lengths holds 30, too short for any task"):
        make(needle_lengths=(30,))

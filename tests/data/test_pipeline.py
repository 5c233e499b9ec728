"""Batches: a pure function of the step, every row once an epoch, any number of processes."""

import collections
import itertools

import numpy as np
import pytest

from memdlm_jax.data.pipeline import BatchPlan, Pipeline, PipelineConfig
from memdlm_jax.data.sft import Row

PAD, EOS = 0, 2
BUCKETS = (8, 16, 32)


class ListOfRows(list):
    def take(self, indices):
        return [self[i] for i in indices]


@pytest.fixture(scope="module")
def rows():
    """Rows that carry their number, 100 + i, at every position."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 33, 103)
    return ListOfRows(
        Row(np.full(n, 100 + i, np.int32), int(rng.integers(0, n))) for i, n in enumerate(lengths)
    )


@pytest.fixture(scope="module")
def build(rows):
    lengths = (
        np.asarray([len(r.tokens) for r in rows]),
        np.asarray([r.prompt_length for r in rows]),
    )
    return lambda **kwargs: Pipeline(
        rows,
        lengths,
        PipelineConfig(**{"buckets": BUCKETS, "rows_per_batch": 8, **kwargs}),
        PAD,
        EOS,
    )


def same(one, two):
    return all(
        np.array_equal(getattr(one, name), getattr(two, name))
        for name in ("tokens", "maskable", "valid")
    )


def numbers(batch):
    return [int(row[0]) - 100 for row in batch.tokens if row[0] != PAD]


@pytest.mark.parametrize("start", [0, 1, 7, 30])
def test_iterating_from_any_start_gives_the_batches_of_the_steps(build, start):
    pipeline = build()
    for step, batch in enumerate(itertools.islice(pipeline.iterate(start), 20), start):
        assert same(batch, pipeline.batch_at(step))


def test_a_batch_does_not_depend_on_what_was_asked_before(build):
    fresh, used = build(), build()
    for step in (40, 3, 17, 3, 90):
        used.batch_at(step)
    assert same(fresh.batch_at(25), used.batch_at(25))


def test_every_row_comes_once_an_epoch_in_a_new_order(build, rows):
    pipeline = build()
    n = pipeline.steps_per_epoch
    epochs = [
        [i for step in range(e * n, (e + 1) * n) for i in numbers(pipeline.batch_at(step))]
        for e in range(3)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(len(rows)))
    assert epochs[0] != epochs[1] != epochs[2]
    assert pipeline.plan.fill_rows == n * 8 - len(rows)
    assert build(seed=1).batch_at(0).tokens.tolist() != pipeline.batch_at(0).tokens.tolist()


def test_rows_are_in_the_shortest_bucket_that_holds_them(build, rows):
    pipeline = build()
    for step in range(pipeline.steps_per_epoch):
        batch = pipeline.batch_at(step)
        place = BUCKETS.index(batch.tokens.shape[1])
        shorter = BUCKETS[place - 1] if place else 0
        assert all(shorter < len(rows[i].tokens) <= BUCKETS[place] for i in numbers(batch))


def test_content_and_masks(build, rows):
    batch = build().batch_at(2)
    assert batch.tokens.dtype == np.int32 and batch.valid.dtype == batch.maskable.dtype == bool
    for tokens, maskable, valid in zip(batch.tokens, batch.maskable, batch.valid, strict=True):
        if tokens[0] == PAD:
            assert not (tokens.any() or maskable.any() or valid.any())
            continue
        row = rows[tokens[0] - 100]
        positions = np.arange(len(tokens))
        assert np.array_equal(tokens[: len(row.tokens)], row.tokens)
        assert not tokens[len(row.tokens) :].any()
        assert np.array_equal(valid, positions < len(row.tokens))
        assert np.array_equal(maskable, valid & (positions >= row.prompt_length))


def test_supervised_padding_is_eos_that_carries_loss(build, rows):
    pipeline = build(supervise_padding=True)
    for step in range(pipeline.steps_per_epoch):
        batch = pipeline.batch_at(step)
        for tokens, maskable, valid in zip(batch.tokens, batch.maskable, batch.valid, strict=True):
            if tokens[0] == PAD:
                assert not (tokens.any() or maskable.any() or valid.any())
                continue
            row = rows[tokens[0] - 100]
            assert (tokens[len(row.tokens) :] == EOS).all()
            assert valid.all() and maskable.sum() == len(tokens) - row.prompt_length


@pytest.mark.parametrize("supervise_padding", [False, True])
def test_target_capacity_holds_every_row(build, supervise_padding):
    pipeline = build(supervise_padding=supervise_padding)
    most = collections.Counter()
    for step in range(pipeline.steps_per_epoch):
        batch = pipeline.batch_at(step)
        length = batch.tokens.shape[1]
        most[length] = max(most[length], batch.maskable.sum(-1).max())
    for length in BUCKETS:
        capacity = pipeline.target_capacity(length)
        assert most[length] <= capacity <= length
        assert capacity % 8 == 0 and capacity - most[length] < 8


def test_processes_share_each_batch(build):
    whole = build()
    for step in range(whole.steps_per_epoch):
        wanted = whole.batch_at(step)
        for chosen in ([0, 1, 4, 5], [2, 3, 6, 7]):
            part = whole.part_at(step, lambda rows, chosen=chosen: np.arange(rows)[chosen])
            for name in ("tokens", "maskable", "valid"):
                assert np.array_equal(getattr(part, name), getattr(wanted, name)[chosen])


def test_the_padding_stated_is_that_of_the_batches(build):
    pipeline = build()
    batches = [pipeline.batch_at(step) for step in range(pipeline.steps_per_epoch)]
    tokens, positions = sum(b.valid.sum() for b in batches), sum(b.valid.size for b in batches)
    share = 1 - tokens / positions
    assert share > 0.1 and pipeline.padding == pytest.approx(share)
    assert f"{share:.1%} padding" in pipeline.describe()
    # What carries loss is padding all the same.
    assert build(supervise_padding=True).padding == pipeline.padding


def test_a_bucket_may_be_empty():
    plan = BatchPlan(np.asarray([20, 21, 22]), BUCKETS, 2)
    assert plan.steps_per_epoch == 2 and plan.fill_rows == 1
    assert {plan.at(step).length for step in range(4)} == {32}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_padding": 1.0}, r"max_padding=1.0 must lie in \[0, 1\)"),
        ({"max_buckets": 0}, "max_buckets=0"),
        ({"bucket_multiple": 0}, "bucket_multiple=0"),
        ({"buckets": (16, 8)}, r"buckets=\(16, 8\) must be ascending"),
        ({"buckets": (0, 8)}, "buckets=0 must be an integer of at least 1"),
        ({"rows_per_batch": 0}, "rows_per_batch=0"),
        ({"rows_per_batch": -4}, "rows_per_batch=-4"),
        ({"seed": -1}, "seed=-1"),
        ({"num_threads": 0}, "num_threads=0"),
    ],
)
def test_bad_config_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PipelineConfig(**kwargs)


def test_bad_use_is_named(build):
    pipeline = build()
    with pytest.raises(ValueError, match=r"buckets=\(8, 16\) must end at 32 or more"):
        build(buckets=(8, 16))
    with pytest.raises(ValueError, match=r"buckets=\(\) must be ascending lengths, at least one"):
        build(buckets=())
    with pytest.raises(ValueError, match="lengths is empty"):
        BatchPlan(np.zeros(0, int), BUCKETS, 2)
    with pytest.raises(ValueError, match=r"length=9 must be one of buckets"):
        pipeline.target_capacity(9)
    with pytest.raises(ValueError, match="step=-1 must be an integer of at least 0"):
        pipeline.batch_at(-1)
    with pytest.raises(ValueError, match="start_step=-1"):
        pipeline.iterate(-1)

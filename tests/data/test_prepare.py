"""Rows on disk: what is written comes back, is found again, and is never mixed up."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from memdlm_jax.data import prepare as module
from memdlm_jax.data.corpora import SourceConfig
from memdlm_jax.data.needles import NeedleConfig
from memdlm_jax.data.pipeline import PipelineConfig, make_pipeline
from memdlm_jax.data.prepare import DataConfig, load_prepared, prepare
from memdlm_jax.data.sft import EncodeConfig, Encoder
from memdlm_jax.data.text import SPLITS


@pytest.fixture(scope="module")
def own_lines(tmp_path_factory, sentences):
    """A JSON-lines file of 200 examples."""
    path = tmp_path_factory.mktemp("own") / "own.jsonl"
    lines = [
        {"prompt": f"Say {i}: {sentences[i % len(sentences)]}", "response": f"It is {i}."}
        for i in range(200)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def haystack(tmp_path_factory, sentences):
    """A folder of text with sections in every split."""
    folder = tmp_path_factory.mktemp("haystack")
    for i in range(90):
        (folder / f"{i}.txt").write_text(" ".join(sentences))
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory, own_lines, haystack, tokenizer):
    folder = tmp_path_factory.mktemp("prepared")
    tokenizer.save(folder / "given.json")
    needles = NeedleConfig(256, num_keys=2)
    return DataConfig(
        directory=str(folder),
        sources=(
            SourceConfig("jsonl", str(own_lines)),
            SourceConfig("needles", str(haystack), needles=needles, episodes=(20, 4, 4)),
        ),
        encode=EncodeConfig(256),
        tokenizer=str(folder / "given.json"),
    )


@pytest.fixture(scope="module")
def prepared(config):
    return prepare(config)


def test_every_example_is_stored_once(prepared, config, tokenizer):
    encoder = Encoder(tokenizer, config.encode)
    for split in SPLITS:
        wanted = [encoder.encode(e) for e in module.examples(config, split, tokenizer)]
        reader = prepared.rows(split)
        stored = reader.take(range(len(reader)))
        assert sorted((r.prompt_length, *r.tokens) for r in stored) == sorted(
            (r.prompt_length, *r.tokens) for r in wanted if not isinstance(r, str)
        )
        assert stored[0].tokens.dtype == np.int32
        assert list(reader[0].tokens) == list(stored[0].tokens)
        with pytest.raises(IndexError, match=r"index=-1 must lie in \[0, "):
            reader[-1]


def test_lengths_are_those_of_the_rows(prepared):
    total, prompt = prepared.lengths("train")
    rows = prepared.rows("train").take(range(len(total)))
    assert [len(r.tokens) for r in rows] == list(total)
    assert [r.prompt_length for r in rows] == list(prompt)


def test_summary_counts_what_is_there(prepared):
    train = prepared.summary["splits"]["train"]
    total, prompt = prepared.lengths("train")
    assert train["rows"] == len(total) == sum(train["rows_by_source"].values())
    assert train["tokens"] == total.sum()
    assert train["response_tokens"] == (total - prompt).sum()
    assert train["length_percentiles"]["p100"] == total.max()
    assert train["rows_by_source"]["needles"] == 20
    assert f"train: {len(total)} rows" in prepared.describe()


def test_the_same_configuration_is_found_again(prepared, config, monkeypatch):
    monkeypatch.setattr(module, "_write", lambda *_: pytest.fail("rows were written again"))
    assert prepare(config).directory == prepared.directory


def test_files_depend_on_the_examples_alone(prepared, config, tmp_path):
    moved = prepare(dataclasses.replace(config, directory=str(tmp_path)))
    assert moved.directory.name == prepared.directory.name
    for split in SPLITS:
        one, two = (p.rows(split) for p in (moved, prepared))
        assert [list(r.tokens) for r in one] == [list(r.tokens) for r in two]


def test_another_setting_or_another_content_is_another_folder(own_lines, tmp_path, tokenizer):
    tokenizer.save(tmp_path / "given.json")
    lines = tmp_path / "own.jsonl"
    lines.write_text(own_lines.read_text())
    config = DataConfig(
        str(tmp_path), (SourceConfig("jsonl", str(lines)),), tokenizer=str(tmp_path / "given.json")
    )
    settings = [
        config,
        dataclasses.replace(config, encode=EncodeConfig(128)),
        dataclasses.replace(config, encode=EncodeConfig(128, "truncate_left")),
        dataclasses.replace(config, seed=1),
        dataclasses.replace(config, tokenizer="", vocab_size=1400),
    ]
    folders = [prepare(setting).directory for setting in settings]
    lines.write_text(own_lines.read_text() + '\n{"prompt": "", "response": "x"}')
    assert len({*folders, prepare(config).directory}) == len(settings) + 1
    lines.write_text(own_lines.read_text())
    (tmp_path / "moved").mkdir()
    moved = lines.rename(tmp_path / "moved" / "own.jsonl")
    elsewhere = dataclasses.replace(config, sources=(SourceConfig("jsonl", str(moved)),))
    assert prepare(elsewhere).directory == folders[0]


def test_a_haystack_without_a_split_is_named(haystack, config, tmp_path):
    (tmp_path / "one.txt").write_text((haystack / "0.txt").read_text())
    needles = NeedleConfig(256)
    source = SourceConfig("needles", str(tmp_path), needles=needles, episodes=(5, 5, 5))
    small = dataclasses.replace(config, directory=str(tmp_path / "out"), sources=(source,))
    with pytest.raises(ValueError, match=r"haystack in '.*' has no text in the split '\w+'"):
        prepare(small)


def test_an_interrupted_run_leaves_nothing_that_is_read(config, tmp_path, monkeypatch):
    broken = dataclasses.replace(config, directory=str(tmp_path))
    real = module._write

    def write_then_fail(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write", write_then_fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(broken)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_is_trained_once_and_its_digest_is_asked_for(own_lines, tmp_path, tokenizer):
    config = DataConfig(str(tmp_path), (SourceConfig("jsonl", str(own_lines)),), vocab_size=1500)
    found = prepare(config)
    assert found.tokenizer.vocab_size == 1500
    pinned = dataclasses.replace(config, tokenizer_digest=found.tokenizer.digest())
    assert prepare(pinned).directory == found.directory
    wrong = dataclasses.replace(config, tokenizer_digest=tokenizer.digest())
    with pytest.raises(ValueError, match="ids of another tokenizer mean other text"):
        prepare(wrong)
    with pytest.raises(ValueError, match=r"tokenizer_digest=\w+ was asked for, but the rows in"):
        load_prepared(found.directory, tokenizer.digest())
    tokenizer.save(found.directory / "tokenizer.json")
    with pytest.raises(ValueError, match="ids of another tokenizer mean other text"):
        load_prepared(found.directory)


def test_text_rows_have_no_prompt(haystack, tmp_path, config):
    text = dataclasses.replace(
        config, directory=str(tmp_path), sources=(SourceConfig("text", str(haystack)),)
    )
    _, prompt = prepare(text).lengths("train")
    assert len(prompt) and not prompt.any()


def test_no_row_at_all_says_why(tmp_path, config, own_lines):
    tight = dataclasses.replace(
        config,
        directory=str(tmp_path),
        sources=(SourceConfig("jsonl", str(own_lines)),),
        encode=EncodeConfig(12),
    )
    with pytest.raises(ValueError, match=r"no row: .*prompt_too_long.* max_length=12"):
        prepare(tight)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    empty = dataclasses.replace(
        tight, sources=(SourceConfig("jsonl", str(tmp_path / "empty.jsonl")),)
    )
    with pytest.raises(ValueError, match="the sources gave no example"):
        prepare(empty)


def test_a_split_without_rows_is_named(tmp_path, config):
    (tmp_path / "one.jsonl").write_text('{"prompt": "Q", "response": "A", "group": "a"}')
    one = dataclasses.replace(
        config,
        directory=str(tmp_path / "out"),
        sources=(SourceConfig("jsonl", str(tmp_path / "one.jsonl")),),
    )
    found = prepare(one)
    assert found.summary["splits"]["test"]["rows"] == 0
    with pytest.raises(ValueError, match=r"split='test' has no rows in .*, only \['train'\] do"):
        found.lengths("test")


def test_what_is_missing_is_named(tmp_path, config):
    with pytest.raises(FileNotFoundError, match="path='/none' of a data source is not there"):
        prepare(dataclasses.replace(config, sources=(SourceConfig("jsonl", "/none"),)))
    with pytest.raises(FileNotFoundError, match="no prepared data in"):
        load_prepared(tmp_path)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: SourceConfig("web"),
            "kind='web' must be one of 'chitchat', .*'needles', or MODULE",
        ),
        (lambda: SourceConfig("jsonl"), "path='' must name a file or folder for kind='jsonl'"),
        (lambda: SourceConfig("needles"), "needles=None must be a NeedleConfig"),
        (lambda: SourceConfig(episodes=(1, -1, 1)), "episodes=-1 must be an integer of at least 0"),
        (lambda: SourceConfig(episodes=(1, 1)), r"episodes=\(1, 1\) must have one number for each"),
        (lambda: DataConfig(""), "directory='' must name a folder"),
        (lambda: DataConfig("x", ()), r"sources=\(\) must name at least one"),
        (lambda: DataConfig("x", vocab_size=0), "vocab_size=0"),
        (lambda: DataConfig("x", seed=-1), "seed=-1"),
        (
            lambda: DataConfig("x", (SourceConfig("needles", needles=NeedleConfig(1024)),)),
            r"needles\.length=1024 must be at most encode\.max_length=512",
        ),
    ],
)
def test_bad_config_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_no_tensorflow_and_no_torch_were_needed(prepared):
    assert len(prepared.rows("train"))
    assert not {"tensorflow", "torch"} & set(sys.modules)


@pytest.mark.parametrize(("multiple", "end"), [(8, 256), (100, 256), (1, None)])
def test_buckets_are_chosen_from_training_and_hold_every_row(prepared, multiple, end):
    config = PipelineConfig(rows_per_batch=4, bucket_multiple=multiple)
    pipelines = [make_pipeline(prepared, split, config) for split in SPLITS]
    train = pipelines[0]
    longest = max(prepared.lengths(split)[0].max() for split in SPLITS)
    assert train.config.buckets[-1] == (end or longest)
    assert all(p.config.buckets == train.config.buckets for p in pipelines)
    # Rows are too few and short for more than multiples of 1.
    assert train.padding <= config.max_padding or multiple > 1
    assert all(length % multiple == 0 for length in train.config.buckets[:-1])
    named = dataclasses.replace(config, buckets=(64, 256))
    assert make_pipeline(prepared, "train", named).config.buckets == (64, 256)

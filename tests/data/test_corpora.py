"""Corpora by name: those of the package, and one of a user's own module."""

import json

import pytest

from experiments import _measures, evaluate, finetune, pretrain
from experiments.configs import evaluate as evaluate_settings
from experiments.configs import finetune_needles, tiny_pretrain
from experiments.configs import prepare_data as prepare_settings
from experiments.prepare_data import from_config_dict
from memdlm_jax.data.corpora import Corpus, SourceConfig
from memdlm_jax.data.prepare import prepare
from memdlm_jax.data.sources import split_of
from memdlm_jax.data.text import SPLITS
from memdlm_jax.registry import CORPORA

TOKENIZER = "memdlm_jax/assets/tiny/tokenizer.json"
MODULE = '''
from memdlm_jax.data.corpora import Corpus
from memdlm_jax.data.example import Example
from memdlm_jax.data.sources import split_of


class Counting(Corpus):
    """What comes after a number."""

    def examples(self, source, split, encoder, seed):
        for i in range(400):
            if split_of(f"count {i}") == split:
                yield Example(f"After {i}?", f"It is {i + STEP}.", f"count {i}", "counting")

    def documents(self, source, split):
        for i in range(400):
            if split_of(f"count {i}") == split:
                yield (("user", f"After {i}?"), ("assistant", f"After it comes {i + STEP}. Yes."))


STEP = 1
counting = Counting()
number = 7
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's own on Python's path."""
    name = f"own_corpus_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def settings(tmp_path, module):
    config = prepare_settings.get_config()
    config.directory, config.tokenizer = str(tmp_path / "data"), TOKENIZER
    config.sources = ({"kind": f"{module}:counting"},)
    return config


def test_a_config_names_a_corpus_of_ones_own(tmp_path, module):
    prepared = prepare(from_config_dict(settings(tmp_path, module)))
    found = prepared.summary["splits"]
    assert {split: found[split]["rows"] for split in SPLITS} == {
        split: sum(split_of(f"count {i}") == split for i in range(400)) for split in SPLITS
    }
    row = prepared.rows("test")[0]
    assert "<|user|>After " in prepared.tokenizer.decode(list(row.tokens), skip_special=False)


def test_rows_are_made_anew_when_the_module_changes(tmp_path, module):
    (source,) = from_config_dict(settings(tmp_path, module)).sources
    before = source.corpus.fingerprint(source)
    assert before == source.corpus.fingerprint(source) and json.dumps(before)
    file = tmp_path / f"{module}.py"
    file.write_text(file.read_text().replace("STEP = 1", "STEP = 2"))
    assert source.corpus.fingerprint(source) != before


def test_a_tokenizer_is_trained_on_its_documents(tmp_path, module):
    config = settings(tmp_path, module)
    config.tokenizer, config.vocab_size = "", 1300
    tokenizer = prepare(from_config_dict(config)).tokenizer
    assert len(tokenizer.encode(" comes")) == 1


def test_a_model_is_trained_on_it(tmp_path, module):
    config = finetune_needles.get_config()
    config.init = "memdlm_jax/assets/tiny"
    config.data.update(directory=str(tmp_path / "data"), sources=({"kind": f"{module}:counting"},))
    config.train.update(output=str(tmp_path / "run"), steps=2, log_every=1, validate_every=2,
                        save_every=2)  # fmt: skip
    config.pipeline.rows_per_batch, config.memory.enabled = 4, False
    assert finetune.finetune(finetune.from_config_dict(config)).finished


def test_haystacks_held_out_rows_and_pretraining_take_it(tmp_path, module):
    config = evaluate_settings.get_config()
    config.update({"output": str(tmp_path), "source": {"kind": f"{module}:counting"}})
    asked = evaluate.from_config_dict(config)
    assert "Yes." in _measures.haystack(asked)
    config = tiny_pretrain.get_config()
    config.data.source.kind = f"{module}:counting"
    source = pretrain.from_config_dict(config).data.source
    assert type(source.corpus).__name__ == "Counting"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("web", r"config.sources\[0\]: kind='web' must be one of 'chitchat', .* or MODULE:NAME"),
        ("MODULE:nothing", r"config.sources\[0\]: kind='own.*:nothing' cannot be imported"),
        ("MODULE:number", r"kind='own.*:number' is int, must be an instance of a Corpus class"),
        ("MODULE:Counting", "kind='own.*' is the class Counting, must be an instance of a Corpus"),
    ],
)
def test_what_is_no_corpus_is_refused_when_the_config_is_read(tmp_path, module, name, message):
    config = settings(tmp_path, module)
    config.sources = ({"kind": name.replace("MODULE", module)},)
    with pytest.raises(ValueError, match=message):
        from_config_dict(config)


def test_fingerprints_of_the_packages_corpora_stay(tmp_path):
    """Rows of earlier versions are found again."""
    (tmp_path / "own.jsonl").write_text("{}")
    content = ["own.jsonl 44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"]
    rest = {"path": "-", "continuation": False, "needles": None, "episodes": (10000, 500, 500)}
    for kind, version in (("jsonl", [2]), ("text", [])):
        source = SourceConfig(kind, str(tmp_path / "own.jsonl"))
        assert source.corpus.fingerprint(source) == [{"kind": kind, **rest}, content, *version]
    chitchat = SourceConfig()
    _, packages = chitchat.corpus.fingerprint(chitchat)
    assert [name.split()[0] for name in packages] == ["chitchat-dataset", "wonderwords"]


def test_every_registered_corpus_is_one():
    assert all(isinstance(CORPORA(name), Corpus) for name in CORPORA.names())

"""Training to answer without the text, and asking such a model: the scripts, end to end."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments import ask, written_memory
from experiments.configs import written_memory as defaults
from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.data.episodes import Episode, encode_text
from memdlm_jax.data.example import Example
from memdlm_jax.evaluation import written

TINY = "memdlm_jax/assets/tiny"
DOCUMENT = "One of the special magic numbers for apple is: 123. The door is green.\nIt rains."


def part(**task):
    sizes = {"texts": 2, "questions": 2, "segment": 40, "segments": 3, "length": 32}
    return {"task": {"keys": 2, "questions": 2} | task, "batch": sizes}


def config(output, **changes):
    found = defaults.get_config()
    found.memory.steps, found.memory.prompt_chunk = 2, 40
    found.stages = (
        {"steps": 1, "parts": (part(),), "visible": 1},
        {"steps": 2, "parts": (part(tokens=60), part()), "visible": 1},
    )
    found.held_out, found.evaluate = (part(),), (part(), part(kind="qa1"))
    found.visible = {"rows": 1, "length": 192, "keys": (2,), "needles": 2}
    found.probe = found.episodes = 3
    found.train.output = str(output)
    found.train.log_every = found.train.save_every = 1
    found.train.validate_every = 2
    found.update(changes)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "run"
    written_memory.main(written_memory.from_config_dict(config(folder)))
    return folder


@pytest.fixture(scope="module")
def model(trained):
    return str(trained / "model")


@pytest.fixture
def document(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text(DOCUMENT)
    return str(file)


def asked(capsys, *arguments):
    ask.main([*arguments, "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_log_and_table_show_memory_on_off_and_of_another_text(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    ways = {name for name in lines[-1] if name.startswith("validation/needles_2/")}
    assert ways == {f"validation/needles_2/{way}" for way in ("on", "off", "other")}
    needles, stories = json.loads((trained / "results.json").read_text())
    assert needles["task"] == "needles_2" and stories["task"] == "qa1"
    assert needles["n"] == stories["n"] == 6
    assert needles["guessing"] == 0.5 and stories["guessing"] == pytest.approx(1 / 6)
    for row in (needles, stories):
        assert {"on", "off", "other", "context"} < row.keys()
        assert 0 <= row["on"]["low"] <= row["on"]["right"] <= row["on"]["high"] <= 1


def test_a_model_folder_is_measured_without_training(trained, model, tmp_path, capsys):
    written_memory.main(written_memory.from_config_dict(config(tmp_path / "asked", model=model)))
    first, again = (folder / "results.json" for folder in (trained, tmp_path / "asked"))
    assert first.read_text() == again.read_text()
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["task", "n", "on", "off", "other", "context", "guessing"]
    assert said[2].split()[:2] == ["needles_2", "6"]
    with pytest.raises(ValueError, match=r"writes segments of memory\.prompt_chunk=0 tokens"):
        written_memory.measure(TINY, written_memory.from_config_dict(config("x")))


def test_a_run_that_was_stopped_ends_the_same(trained, tmp_path):
    """The first two steps, then the rest by the same command."""
    shutil.copytree(trained, tmp_path / "again")
    for step in ("3",):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / step)
    shutil.rmtree(tmp_path / "again" / "model")
    written_memory.main(written_memory.from_config_dict(config(tmp_path / "again")))
    for name in ("model.safetensors", "inner_parameters.safetensors"):
        whole, resumed = (folder / "model" / name for folder in (trained, tmp_path / "again"))
        assert whole.read_bytes() == resumed.read_bytes()


def test_the_model_remembers_how_it_writes(model):
    system, memory, _, _ = ask.load(model)
    assert (memory.masking, memory.steps, memory.pieces) == ("cover", 2, "parallel")
    assert jax.tree.leaves(system.learned.log_rates)[0].shape == (2, 1)


def test_ask_answers_with_and_without_memory(model, document, capsys):
    questions = ["What is the special magic number for apple?", "Does it rain?"]
    flags = [f"--question={q}" for q in questions]
    found = asked(capsys, f"--model={model}", f"--document={document}", *flags)
    assert [one["question"] for one in found] == questions
    assert all({"question", "answer", "answer_without_memory"} == one.keys() for one in found)


def test_a_saved_memory_answers_like_the_document(model, document, capsys, tmp_path):
    kept, question = str(tmp_path / "kept.safetensors"), "--question=What is it?"
    first = asked(
        capsys, f"--model={model}", f"--document={document}", question, f"--save_memory={kept}"
    )
    again = asked(capsys, f"--model={model}", f"--load_memory={kept}", question)
    assert first == again
    with pytest.raises(SystemExit, match="written with other weights"):
        ask.main([f"--model={TINY}", f"--load_memory={kept}", question])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--question=a"], "exactly one of --document and --load_memory"),
        (["--document=x"], "--question or --save_memory must be given"),
        (["--document=x", "--question= "], "must have some text"),
        (["--load_memory=x", "--question=a", "--save_memory=y"], "--save_memory needs --document"),
    ],
)
def test_bad_arguments(arguments, said, capsys):
    with pytest.raises(SystemExit):
        ask.main([f"--model={TINY}", *arguments])
    assert said in capsys.readouterr().err


def test_bad_input_is_one_line(model, document, tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*none\.txt"):
        ask.main([f"--model={model}", f"--document={tmp_path}/none.txt", "--question=a"])
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(SystemExit, match="error: the text is empty"):
        ask.main([f"--model={model}", f"--document={empty}", "--question=a"])
    with pytest.raises(SystemExit, match="was not trained to answer from memory"):
        ask.main([f"--model={TINY}", f"--document={document}", "--question=a"])
    empty.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(SystemExit, match="is not UTF-8"):
        ask.main([f"--model={model}", f"--document={empty}", "--question=a"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stages": ()}, r"stages=\(\) must have at least one"),
        ({"init": ""}, "init='' must name"),
        ({"least": 0.0}, r"least=0\.0 must be in"),
        ({"evaluate": (part(questions=1),)}, "batch.questions=2 must be task.questions=1"),
        ({"held_out": ({"task": {}, "batch": {"segment": 64}},)}, "batch.segment=64 must be"),
    ],
)
def test_bad_settings_are_named(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        written_memory.train(written_memory.from_config_dict(config(tmp_path, **changes)))


class TestAsker:
    """A model that is not trained is asked all questions in every way."""

    def test_memory_of_its_own_text_is_read_and_of_another_too(self, model, monkeypatch):
        system, _, tokenizer, longest = ask.load(model)
        seen, texts_written = [], []
        generate, write = written.generation.generate, written._write

        def spy(generator, theta, prompts, learned, phi):
            seen.append(phi)
            return generate(generator, theta, prompts, learned, phi)

        def spy_on_texts(loop, key, theta, learned, texts):
            texts_written.append(texts.tokens)
            return write(loop, key, theta, learned, texts)

        monkeypatch.setattr(written.generation, "generate", spy)
        monkeypatch.setattr(written, "_write", spy_on_texts)
        sizes = written_memory.EpisodeConfig(texts=2, questions=1, segment=40, segments=2)
        kind = written_memory.EpisodeBatches(None, tokenizer, sizes)
        episodes = [
            Episode((f"Box {n} is red.",), (Example(f"Box {n}?", "red", "x", "x"),), ("red",))
            for n in ("one", "two", "three")
        ]
        decode = written.decoding(tokenizer, episodes)
        found = written.Asker(system, kind, decode, longest).ask(episodes)
        assert {way: len(one.correct) for way, one in found.items()} == dict.fromkeys(
            written.WAYS, 3
        )
        on, off, other, context = seen[:4]
        assert off is None and context is None
        for phi in (on, other):
            assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(phi))
        first, second, third = episodes
        own_and_other = [[first, second], [third, first], [third, first], [second, third]]
        for tokens, expected in zip(texts_written, own_and_other, strict=True):
            np.testing.assert_array_equal(tokens, kind.batch_of(expected).context.tokens)

    def test_other_needs_another_text(self, model):
        system, _, tokenizer, longest = ask.load(model)
        kind = written_memory.EpisodeBatches(None, tokenizer, written_memory.EpisodeConfig())
        one = Episode(("A.",), (Example("A?", "A", "x", "x"),))
        with pytest.raises(ValueError, match="way='other' needs at least 2"):
            written.Asker(system, kind, written.decoding(tokenizer, [one]), longest).ask([one])


def test_answers_match_but_for_space_case_and_full_stop():
    assert written.matches(" Kitchen.", "kitchen") and written.matches("a  b", "a b")
    assert not written.matches("1234", "123") and not written.matches("", "a")


def test_writing_is_what_the_library_writes(model):
    """The script's memory is ``write_texts`` of the document's segments."""
    system, memory, tokenizer, _ = ask.load(model)
    phi, count = ask.read(system, tokenizer, DOCUMENT, 3)
    texts = encode_text(tokenizer, DOCUMENT, memory.prompt_chunk)
    assert count == texts.valid.sum()
    same, _ = written.written.write_texts(
        jax.random.key(3), system.inner_loop, system.theta, texts, system.learned
    )
    for a, b in zip(jax.tree.leaves(phi), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_the_plain_model_is_unchanged_by_an_empty_text():
    """Rows with their context visible train the model itself: their memory is phi_0."""
    denoiser, theta = hugging_face.load(TINY)
    found = config("x")
    settings = written_memory.from_config_dict(found)
    loop = written_memory.InnerLoop(denoiser, settings.memory)
    tokenizer = written_memory.Tokenizer.load(TINY)
    rows = written_memory.VisibleRows(
        [Example("Who?", "me", "x", "x")], tokenizer, rows=2, length=16, segment=40
    )
    texts = rows.batch_at(0).context
    phi, _ = written.written.write_texts(jax.random.key(0), loop, theta, texts)
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(phi))


def test_a_curriculum_takes_its_kinds_in_turn_and_ordinary_rows_between():
    class Named:
        def __init__(self, name, length=32):
            self.name, self.config, self.length = name, self, length

        def batch_at(self, step):
            return f"{self.name}{step}"

        def target_capacity(self, length):
            return length // 8

    stages = written_memory.from_config_dict(config("x")).stages
    first = written_memory.dataclasses.replace(stages[0], steps=3, visible=0)
    second = written_memory.dataclasses.replace(stages[1], steps=6, visible=2)
    kinds = [Named("a"), Named("b", 16)]
    curriculum = written_memory.Curriculum([(first, kinds), (second, kinds)], Named("v", 64))
    taken = [curriculum.batch_at(step) for step in range(9)]
    assert taken == ["a0", "b1", "a2", "a0", "b1", "v2", "a3", "b4", "v5"]
    assert [curriculum.target_capacity(length) for length in (32, 16, 64)] == [4, 2, 8]
    with pytest.raises(IndexError):
        curriculum.batch_at(9)

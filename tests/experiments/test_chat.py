import dataclasses
import html
import io
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from experiments import _chat_model, chat
from experiments._chat_screen import Screen, painted
from experiments.configs import chat as chat_defaults
from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.data.example import Example
from memdlm_jax.data.tokenizer import Tokenizer, train_tokenizer
from memdlm_jax.diffusion import decode
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation.animation import MASK, shown
from memdlm_jax.evaluation.systems import System, prompt_ids, respond
from memdlm_jax.inference import generation
from memdlm_jax.inference.generation import Generator, Prompts
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerStep, inner_loop_for
from memdlm_jax.models.llada import LLaDA, LLaDAConfig

ROOT = Path(__file__).parents[2]
WORDS = "the cat sat on mats and saw how every green bird flew"
DECODE = DecodeConfig(length=8, block_length=4, steps=8)
# One module: what is tested here compiles in a fraction of the time.
MEMORY = MemoryConfig(
    rank=4, alpha=8.0, layer_fraction=0.5, learning_rate=1.0, target_modules=("mlp/up_proj",)
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder with random weights, large enough for answers that depend on the prompt."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([WORDS] * 3, 300, whole_numbers=False)
    denoiser = LLaDA(
        LLaDAConfig(
            vocab_size=tokenizer.vocab_size, width=16, num_layers=2, num_heads=2, num_kv_heads=2,
            hidden_features=24, mask_token_id=tokenizer.mask_id, max_length=136,
        )
    )  # fmt: skip
    theta = jax.tree.map(lambda x: 3 * x, jax.jit(denoiser.init)(jax.random.key(1)))
    hugging_face.save(folder, denoiser, theta)
    tokenizer.save(folder / "tokenizer.json")
    return str(folder)


@pytest.fixture
def talk(model, monkeypatch, capsys):
    """Pipes lines into a chat; gives lines of standard output and of standard error."""

    def run(*lines, **settings):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat.main(chat.ChatConfig(**{"model": model, "decode": DECODE} | settings))
        out, err = capsys.readouterr()
        return out.splitlines(), err.splitlines()

    return run


def quiet(config):
    return chat.Chat(config, Screen(Console(file=io.StringIO())))


def reply_to(config, text, memory=None):
    """What the rest of the library makes of the same prompt, with the same seed."""
    talking = quiet(config)
    tokenizer = talking.tokenizer
    ids = prompt_ids(tokenizer, Example(text, "?", "test", "test"), 10_000)
    inner_loop = inner_loop_for(talking.denoiser, memory)
    system = System("s", talking.denoiser, talking.theta, inner_loop)
    tokens = respond(
        system, [ids], talking.decode, seed=0, pad_token_id=tokenizer.pad_id,
        max_length=talking.max_length,
    ).tokens[0].tolist()  # fmt: skip
    ends = [tokens.index(end) for end in talking.decode.stop if end in tokens]
    return tokenizer.decode(tokens[: min(ends, default=None)])


def test_replies_are_those_of_the_library_one_a_line(talk, model):
    out, err = talk("the cat", "", "and how")
    config = chat.ChatConfig(model, DECODE)
    assert len(out) == 2
    assert out[0] == " ".join(reply_to(config, "the cat").splitlines())
    assert len(err) == 1 and "/help" in err[0], "without memory there is nothing to tell"


def test_the_model_sees_the_whole_conversation(model):
    talking = quiet(chat.ChatConfig(model, DECODE))
    talking.say("the cat")
    talking.say("and how")
    (first, text), (second, reply), (_, asked), _ = talking.turns
    assert (first, text, second, asked) == ("user", "the cat", "assistant", "and how")
    spelled = (
        f"<|user|>the cat<|eos|><|assistant|>{reply}<|eos|><|user|>and how<|eos|><|assistant|>"
    )
    assert talking.history["prompt"] == spelled
    talking.forget()
    talking.say("and how")
    assert talking.history["prompt"] == "<|user|>and how<|eos|><|assistant|>"


LINE = re.compile(
    r"memory: writing (\d+\.\d+) s, decoding (\d+\.\d+) s, share of writing (\d+\.\d) %; "
    r"([\d,]+) fast weights, (\d+\.\d+) MB; inner loss (\d+\.\d{4}), (\d+\.\d{4})(; compiled.*)?$"
)


def test_memory_is_written_and_its_cost_said(talk, model):
    out, err = talk("the cat", "/memory show", "and how", memory=MEMORY)
    config = chat.ChatConfig(model, DECODE)
    assert out[0] == " ".join(reply_to(config, "the cat", MEMORY).splitlines())
    first, second = (LINE.match(line) for line in err if line.startswith("memory:"))
    weights = 16 * 4 + 4 * 24  # A and B of one matrix of one layer.
    assert int(first[4]) == weights and first[5] == f"{weights * 4 / 1e6:.3f}" == "0.001"
    writing, decoding, share = (float(first[i]) for i in (1, 2, 3))
    assert 0 < writing < 5 and 0 < decoding < 5
    assert share == pytest.approx(100 * writing / (writing + decoding), abs=1)
    assert "not counted" in first[8] and second[8] is None, "the width is that of the first turn"
    assert first[6] != second[6]
    assert any("mlp/up_proj" in line for line in err)


def test_memory_goes_on_and_off(talk):
    lines = "/memory show", "/memory", "the cat", "/memory off", "the cat", "/memory on", "/memory"
    out, err = talk(*lines, memory=None, standby=MEMORY)
    assert len(out) == 2
    said = [line.partition(";")[0].partition(":")[0] for line in err[1:]]
    assert said == ["error", "memory is on", "memory"] + [
        f"memory is {x}" for x in ("off", "on", "off")
    ]
    assert err[1] == "error: nothing has been written into memory yet"


def test_losses_of_pieces_and_of_steps_left_out():
    record = InnerStep(
        np.array([[[1.0], [2.0]], [[np.nan], [3.0]], [[np.nan], [np.nan]]]),
        loss_after=None,
        gradient_norm=None,
        skipped=np.array([[[False], [False]], [[True], [False]], [[False], [False]]]),
    )
    losses = _chat_model.losses_of(record)
    assert losses == [1.0, 2.0, None, 3.0]
    cost = _chat_model.Cost(0.0, 1.0, 3.0, 1234, 4936, losses)
    assert "share of writing 25.0 %; 1,234 fast weights" in str(cost)
    assert str(cost).endswith("inner loss 1.0000, 2.0000, left out, 3.0000")


def test_mistakes_are_said_in_one_line_and_the_chat_goes_on(talk, tmp_path):
    long = "cat " * 200
    lines = "/fly", "/memory sideways", "/save a.html", long, "/quit now", "the cat", "/save a.png"
    out, err = talk(*lines, f"/save {tmp_path}", "/help", "/quit", "never read")
    assert len(out) == 1, "one reply"
    errors = [line for line in err if line.startswith("error:")]
    assert errors[0] == "error: '/fly' is no command; /help lists them"
    assert errors[1] == "error: '/memory sideways' is no command; /help lists them"
    assert errors[2] == "error: there is no reply to save yet"
    assert re.match(r"error: the message takes \d{3} tokens; it must have at most 128", errors[3])
    assert errors[4] == "error: '/quit now' is no command; /help lists them"
    assert errors[5] == "error: path='a.png' must end in .html or .gif"
    assert errors[6].startswith("error: path=") and len(errors) == 7
    assert any(line.startswith("/forget") for line in err)


def test_turns_that_do_not_fit_are_left_out_and_that_is_said_once(talk, model):
    """Room for 64 tokens: two exchanges and a message."""
    out, err = talk(*(f"{WORDS} {i}" for i in range(5)), max_length=72)
    drops = [line for line in err if "left out" in line]
    assert len(out) == 5 and 1 <= len(drops) < 5
    assert set(drops) == {"the conversation is too long: 2 oldest turns left out"}
    talking = quiet(chat.ChatConfig(model, DECODE, max_length=72))
    for i in range(5):
        talking.say(f"{WORDS} {i}")
        assert f"{WORDS} {i}" in talking.history["prompt"]
    assert talking.left_out == 2 * len(drops)
    kept = [i for i in range(5) if f"{WORDS} {i}" in talking.history["prompt"]]
    assert kept == list(range(len(drops), 5)), "the oldest go, and no more of them than must"
    fits, too_long = (
        _chat_model.encoded(talking.tokenizer, talking.turns[first:-1])
        for first in (talking.left_out, talking.left_out - 2)
    )
    assert len(fits) <= talking.room < len(too_long)


def test_what_fits_to_the_token_fits(model):
    tokenizer = Tokenizer.load(Path(model) / "tokenizer.json")
    turns = [("user", "the cat"), ("assistant", "sat"), ("user", "on mats")]
    whole, end = (_chat_model.encoded(tokenizer, turns[first:]) for first in (0, 2))
    assert _chat_model.fit(tokenizer, turns, len(whole)) == (whole, 0)
    for room in (len(whole) - 1, len(end)):
        assert _chat_model.fit(tokenizer, turns, room) == (end, 2)
    with pytest.raises(ValueError, match=rf"takes {len(end)} tokens; .* at most {len(end) - 1},"):
        _chat_model.fit(tokenizer, turns, len(end) - 1)


def test_a_reply_ends_at_the_first_token_that_ends_one(model):
    talking = quiet(chat.ChatConfig(model, DECODE))
    talking.say("the cat")
    final = talking.history["tokens"][-1]
    at = next(i for i in range(1, 4) if final[i] not in final[:i])
    (end,) = talking.tokenizer.encode(final[at])
    cut = quiet(chat.ChatConfig(model, dataclasses.replace(DECODE, stop=(end,))))
    cut.say("the cat")
    assert cut.turns[1][1] == "".join(final[:at])
    assert talking.turns[1][1].startswith(cut.turns[1][1]) and talking.turns != cut.turns
    assert cut.history["tokens"][-1][4:] == [None] * 4, "the second block is left out"


def test_in_pieces_what_is_left_out_is_still_written(model, capsys):
    memory = dataclasses.replace(MEMORY, prompt_chunk=32)
    talking = quiet(chat.ChatConfig(model, DECODE, memory, max_length=72))
    given = []

    class Stopped(Exception):
        pass

    def answer(keys, prompt, written, show, document):
        assert document is None
        given.extend([prompt, written])
        raise Stopped

    talking.answerer.answer = answer
    talking.turns = [("user", WORDS), ("assistant", WORDS)] * 3
    with pytest.raises(Stopped):
        talking.say("how")
    prompt, written = ([int(n) for n in tokens[valid]] for tokens, valid in given)
    turns = [*talking.turns, ("user", "how")]
    assert written == _chat_model.encoded(talking.tokenizer, turns)
    assert written[-len(prompt) :] == prompt and len(prompt) <= 64 < len(written)
    assert "left out, but still written into memory" in capsys.readouterr().err


def test_growing_prompts_share_widths(model):
    tokenizer = Tokenizer.load(Path(model) / "tokenizer.json")
    widths = [
        _chat_model.padded(tokenizer, [5] * n, 130)[0].shape[1] for n in (1, 64, 65, 129, 130)
    ]
    assert widths == [64, 64, 128, 130, 130]


def test_the_record_of_what_was_watched_is_that_of_generate(model):
    talking = quiet(chat.ChatConfig(model, dataclasses.replace(DECODE, editing_threshold=0.0)))
    # A stop token that comes at once leaves the last block as it was.
    mask, size = talking.tokenizer.mask_id, talking.tokenizer.vocab_size
    stop = tuple(token for token in range(size) if token != mask)
    generator = Generator(talking.denoiser, None, dataclasses.replace(talking.decode, stop=stop))
    ids = _chat_model.encoded(talking.tokenizer, [("user", "the cat")])
    prompt = _chat_model.padded(talking.tokenizer, ids, talking.room)
    keys, pictures = jax.random.key(0)[None], []
    answerer = _chat_model.Answerer(generator, talking.theta, None)
    decoded, phi, cost = answerer.answer(keys, prompt, prompt, pictures.append)
    assert phi is None and cost is None and len(pictures) == int(decoded.steps[0]) + 1
    whole = generation.generate(generator, talking.theta, Prompts(keys, *prompt), record=True)
    expected = decode.history(jax.device_get(whole), mask)
    np.testing.assert_array_equal(decode.history(decoded, mask), expected)
    assert (expected[-1, 0, 4:] == mask).all() and (expected[-1, 0, :4] != mask).all()


def test_exports_hold_the_tokens_escaped(talk, model, tmp_path):
    page, clip, last = tmp_path / "new" / "a.html", tmp_path / "a.gif", tmp_path / "last.html"
    talking = quiet(chat.ChatConfig(model, DECODE))
    talking.say("the <b>cat</b>")
    assert chat.command(talking, f"/save {page}") and chat.command(talking, f"/save {clip}")
    text, final = page.read_text(), talking.history["tokens"][-1]
    assert "&lt;|user|&gt;the &lt;b&gt;cat&lt;/b&gt;&lt;|eos|&gt;" in text
    assert "<|" not in text and "<b>" not in text
    cells = re.findall(r"<span class=[^>]*--light[^>]*>([^<]*)</span>", text)
    assert len(cells) == DECODE.length and any(final)
    assert list(map(html.unescape, cells)) == [MASK if t is None else shown(t) for t in final]
    with Image.open(clip) as image:
        assert image.n_frames == len(talking.history["tokens"]) > 1
    talk("the cat", "on mats", export=str(last))
    assert "on mats&lt;|eos|&gt;&lt;|assistant|&gt;" in last.read_text()


def test_a_terminal_shows_the_canvas_live(model, monkeypatch):
    out = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=200)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the \x1b[5mcat\n"))
    chat.main(chat.ChatConfig(model, DECODE), out)
    text = out.file.getvalue()
    canvases = [part for part in text.split("\r") if part.count(MASK)]
    masks = [part.count(MASK) for part in canvases]
    assert masks[0] == DECODE.length and masks == sorted(masks, reverse=True) and len(masks) > 1
    assert f"\x1b[2m{MASK} " in text and "\x1b[38;2;" in text, "dim blocks, coloured tokens"
    assert "> the \ufffd[5mcat" in text and "\x1b[5m" not in text
    talking = quiet(chat.ChatConfig(model, DECODE))
    talking.say("the \x1b[5mcat")
    final = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text).rstrip("\n").split("\r")[-1]
    assert final.strip() == re.sub(r"[\x00-\x08\x0b-\x1f]", "\ufffd", talking.turns[1][1]).strip()


def test_what_is_not_decoded_stays_masked_in_the_last_picture(model):
    (end,) = Tokenizer.load(Path(model) / "tokenizer.json").encode("s")
    talking = quiet(chat.ChatConfig(model, dataclasses.replace(DECODE, stop=(end,))))
    window, steps = np.array([[7, end, end, end]]), np.array([[0, 1, -1, -1]])
    picture = talking._picture(decode.Decoded(window, steps, np.ones((1, 4)), 2, 2, 0))
    assert picture.plain.count(MASK) == 2 and picture.plain.count("s") == 1


def test_tokens_that_are_half_a_character_are_shown_together(model):
    tokenizer = Tokenizer.load(Path(model) / "tokenizer.json")
    ids = np.array([*tokenizer.encode("a☃\n\x1b"), tokenizer.mask_id, *tokenizer.encode("é")[:1]])
    assert len(ids) == 8
    confidence = np.linspace(0, 1, 8)
    text = painted(tokenizer, ids, confidence, tokenizer.mask_id)
    assert text.plain == f"a☃\n\ufffd{MASK} \ufffd"
    assert (
        str(text.spans[0].style) == "rgb(214,94,0)"
        and str(text.spans[-1].style) == "rgb(30,136,210)"
    )
    assert len({str(span.style) for span in text.spans}) == len(text.spans) == 6
    cut = np.array([ids[1], tokenizer.mask_id, ids[2]])
    assert painted(tokenizer, cut, confidence, tokenizer.mask_id).plain == f"\ufffd{MASK} \ufffd"


def test_an_interrupt_stops_the_reply_and_in_a_pipe_the_chat(talk, model, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(_chat_model.Answerer, "answer", interrupt)
    out, err = talk("the cat", "/help")
    assert out == [] and len(err) == 1
    lines = iter(["/fly", "the cat"])

    def typed(prompt):
        for line in lines:
            return line
        raise EOFError

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys, "stdin", Terminal())
    screen = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=200)
    chat.main(chat.ChatConfig(model, DECODE), screen)
    said = screen.file.getvalue()
    assert "stopped; the message is forgotten\n" in said
    assert "error: '/fly' is no command" in said


def built(**settings):
    config = chat_defaults.get_config()
    config.update(settings)
    return chat.from_config_dict(config)


def test_settings(model):
    plain = built(model=model)
    assert plain.memory is None and plain.standby is None and plain.decode.length == 32
    assert built(model=model, memory={"enabled": True}).memory == MemoryConfig()
    waiting = built(model=model, memory={"steps": 4}, decode={"threshold": 0.9, "stop": (3,)})
    assert waiting.memory is None and waiting.standby == MemoryConfig(steps=4)
    assert waiting.decode.threshold == 0.9
    talking = quiet(waiting)
    assert talking.decode.stop[0] == 3 and talking.tokenizer.eos_id in talking.decode.stop
    chat.command(talking, "/memory on")
    assert talking.memory == MemoryConfig(steps=4)
    talking = quiet(plain)
    assert talking.decode.stop == (talking.tokenizer.eos_id,), "here it ends turns, too"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "model='' must name a model folder"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"pause": -1.0}, "pause=-1.0 must be at least 0"),
        ({"export": "a.txt"}, "export='a.txt' must end in .html or .gif"),
        ({"decode": {"length": 0}}, "decode.length=0 must be at least 1"),
        ({"memory": {"rank": 0}}, "memory.rank=0 must be at least 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        built(**{"model": "m"} | settings)


def test_an_answer_that_leaves_no_room_is_named(model):
    with pytest.raises(ValueError, match=r"decode\.length=8 must be less than max_length=8"):
        quiet(chat.ChatConfig(model, DECODE, max_length=8))


def test_the_short_flag_enables_memory(model):
    command = [
        sys.executable, "-m", "experiments.chat", f"--config.model={model}", "--memory",
        "--config.memory.prompt_chunk=500",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, input="", capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.endswith(
        "error: memory.prompt_chunk=500 must be at most max_length=136\n"
    )
    assert done.stdout == ""


def test_a_file_that_was_read_answers_until_it_is_forgotten(talk, model, tmp_path):
    """Replies use the file's memory alone; off and after /forget they are those without it."""
    file = tmp_path / "notes.txt"
    file.write_text("The cat saw every bird. The mats flew.")
    memory = dataclasses.replace(MEMORY, prompt_chunk=16, pieces="parallel", masking="cover")
    ask = "every green cat"
    with_file, off, after = talk(
        f"/read {file}", ask, "/memory off", "/forget", ask, "/memory on", "/forget", ask,
        memory=memory,
    )[0]  # fmt: skip
    plain = talk(ask)[0][0]
    written = talk(ask, memory=memory)[0][0]
    assert off == plain and after == written
    talking = quiet(chat.ChatConfig(model=model, decode=DECODE, memory=memory))
    talking.read(str(file))
    own, document = talking.phi, talking.document
    assert own is document
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(document))
    system = System("s", talking.denoiser, talking.theta, inner_loop_for(talking.denoiser, memory))
    ids = prompt_ids(talking.tokenizer, Example(ask, "?", "test", "test"), 10_000)
    prompts = Prompts(
        jax.random.fold_in(jax.random.key(0), 0)[None],
        *_chat_model.padded(talking.tokenizer, ids, talking.room),
    )
    generator = Generator(talking.denoiser, system.inner_loop, talking.decode)
    decoded = generation.generate(generator, talking.theta, prompts, None, document)
    ends = chat.replies(talking.tokenizer, jax.device_get(decoded), talking.decode.stop)
    assert with_file == " ".join(ends.texts[0].splitlines())


def test_what_cannot_be_read_is_told(talk, tmp_path):
    said = "\n".join(talk(f"/read {tmp_path}/none.txt", memory=MEMORY)[1])
    assert "memory.prompt_chunk=0 must be set" in said
    pieces = dataclasses.replace(MEMORY, prompt_chunk=16)
    said = "\n".join(talk(f"/read {tmp_path}/none.txt", memory=pieces)[1])
    assert "none.txt" in said

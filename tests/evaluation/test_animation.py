import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from memdlm_jax.diffusion.decode import Decoded
from memdlm_jax.evaluation import animation

WIDTH = 5


@pytest.fixture
def decoded(tokenizer):
    """Five positions in four steps: the first is overwritten, the last never decoded."""
    mask = tokenizer.mask_id
    cat, sat, less, end = (tokenizer.encode(t)[0] for t in (" cat", " sat", "<", "\n"))
    history = np.full((5, WIDTH), mask)
    history[1:, 0] = cat
    history[2:, 1] = less
    history[3:, 0] = sat
    history[3:, 2] = end
    history[4:, 3] = tokenizer.encode("é")[0]
    commit, confidence = [2, 1, 2, 3, -1], [0.9, 0.5, 1.0, 0.0, 0.0]
    final = np.where(np.array(commit) < 0, tokenizer.eos_id, history[-1])
    leaves = final, np.array(commit), np.array(confidence), np.array(4)
    leaves = [np.stack([np.zeros_like(leaf), leaf]) for leaf in leaves]  # It is the second row.
    windows = np.stack([np.zeros_like(history), history])
    return Decoded(*leaves, whole=4, parts=0, history=windows)


@pytest.fixture
def history(decoded, tokenizer):
    return animation.frames(decoded, 1, tokenizer, tokenizer.mask_id, 'say "<b>" & é\nnow')


def test_frames_are_json_and_say_what_happened(history):
    assert json.loads(json.dumps(history)) == history
    assert history["tokens"] == [
        [None, None, None, None, None],
        [" cat", None, None, None, None],
        [" cat", "<", None, None, None],
        [" sat", "<", "\n", None, None],
        [" sat", "<", "\n", "\ufffd", None],
    ]
    assert history["changed"] == [[1, 3], [2], [3], [4], []]
    assert history["commit_step"] == [2, 1, 2, 3, -1]
    assert history["confidence"] == [0.9, 0.5, 1.0, 0.0, 0.0]
    assert history["steps"] == 4 and history["prompt"].startswith("say")


def test_without_a_record_edits_show_their_last_token(decoded, tokenizer):
    bare = dataclasses.replace(decoded, history=None)
    found = animation.frames(bare, 1, tokenizer, tokenizer.mask_id)
    assert [window[0] for window in found["tokens"]] == [None, None, None, " sat", " sat"]
    assert found["changed"][0] == [3] and found["changed"][4] == []


def test_a_confidence_that_is_no_number_counts_as_none(decoded, tokenizer):
    odd = np.where(decoded.confidence == 0.9, np.nan, decoded.confidence * 1.0000001)
    odd = dataclasses.replace(decoded, confidence=odd)
    found = animation.frames(odd, 1, tokenizer, tokenizer.mask_id)
    assert found["confidence"] == [0.0, 0.5, 1.0, 0.0, 0.0]


def test_colours_run_from_end_to_end_through_the_middle():
    low, middle, high = animation.LIGHT
    assert [animation.blend(animation.LIGHT, c) for c in (0, 0.5, 1)] == [low, middle, high]
    assert animation.blend(animation.LIGHT, 2.0) == high
    assert animation.blend(animation.LIGHT, float("nan")) == low
    between = animation.blend(animation.LIGHT, 0.25)
    assert all(min(a, b) < c < max(a, b) for a, b, c in zip(low, middle, between, strict=True))


def test_what_cannot_be_seen_gets_a_sign():
    assert animation.shown(" a\n\t") == " a⏎⇥" and animation.shown("") == "∅"
    assert animation.shown("\x1b[31m") == "\ufffd[31m"


class Page(HTMLParser):
    """Texts of the cells, of scripts by id and of the rest; and all that points elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.styles, self.data, self.elsewhere = [], [], "", []
        self.text, self.tags, self.inside = "", [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.elsewhere += [named[k] for k in ("src", "href", "srcset", "action") if k in named]
        self.tags.append(tag)
        if tag == "span" and "--light" in named.get("style", ""):
            self.cells.append([named["class"], ""])
            self.styles.append(named["style"])
            self.inside = "cell"
        elif tag in ("script", "style"):
            self.inside = named.get("id", tag)

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "cell":
            self.cells[-1][1] += data
        elif self.inside == "changes":
            self.data += data
        elif not self.inside:
            self.text += data


def test_the_page_shows_the_end_without_scripts_and_has_all_steps(history):
    text = animation.html(history, "A <title>")
    page = Page(text)
    assert page.cells == [
        ["edited", " sat"], ["", "<"], ["", "⏎"], ["", "\ufffd"], ["mask", animation.MASK]
    ]  # fmt: skip
    changes = [[[1, " cat"], [3, " sat"]], [[2, "<"]], [[3, "⏎"]], [[4, "\ufffd"]], []]
    assert json.loads(page.data) == changes
    assert 'say "<b>" & é\nnow' in page.text and "A <title>" in page.text
    assert "Underlined" in page.text and "confidence" in page.text.lower()
    controls = re.search(r'<div id="controls" hidden>.*?</div>', text, re.DOTALL)[0]
    assert 'type="range"' in controls and 'max="4"' in controls and "<button" in controls
    assert "prefers-color-scheme: dark" in text
    assert page.elsewhere == [] and "http" not in text and "@import" not in text


def test_colours_of_the_page_are_those_of_the_confidence(history):
    styles = Page(animation.html(history, "t")).styles
    for style, confidence in zip(styles, (0.9, 0.5, 1.0, 0.0), strict=False):
        for scale, name in ((animation.LIGHT, "--light"), (animation.DARK, "--dark")):
            colour = "#{:02x}{:02x}{:02x}".format(*animation.blend(scale, confidence))
            assert f"{name}: {colour}" in style


def test_a_page_is_no_place_for_markup_of_a_model(history):
    evil = "</script><script>alert(1)</script><!--"
    history["tokens"][4][3] = evil
    history["prompt"] = evil
    text = animation.html(history, evil)
    page = Page(text)
    assert page.cells[3] == ["", evil] and json.loads(page.data)[3] == [[4, evil]]
    assert page.tags.count("script") == 2 and "<!--" not in text
    assert text.count(evil) == 0


def test_a_page_without_edits_does_not_explain_them(decoded, tokenizer):
    bare = dataclasses.replace(decoded, history=None)
    history = animation.frames(bare, 1, tokenizer, tokenizer.mask_id)
    assert "Underlined" not in Page(animation.html(history, "t")).text


def pictures(path):
    """Frames as [h, w, 3] arrays, and their times in milliseconds."""
    found, times = [], []
    with Image.open(path) as image:
        assert image.info["loop"] == 0
        for i in range(image.n_frames):
            image.seek(i)
            found.append(np.asarray(image.convert("RGB")).astype(int))
            times.append(image.info["duration"])
    return found, times


def pixels(picture, colour):
    """Pixels of about this colour, above the legend."""
    return int((np.abs(picture[:-60] - np.array(colour)).max(-1) <= 6).sum())


def test_the_gif_fills_the_canvas_step_by_step(history, tmp_path):
    animation.gif(history, tmp_path / "a.gif", title="t", width=400, frame_ms=100, last_ms=900)
    found, times = pictures(tmp_path / "a.gif")
    assert times == [100, 100, 100, 100, 900]
    assert {picture.shape for picture in found} == {(found[0].shape[0], 400, 3)}
    sure, unsure = animation.LIGHT[2], animation.LIGHT[0]  # Committed in steps 3 and 4.
    assert [pixels(picture, sure) > 50 for picture in found] == [False, False, False, True, True]
    assert [pixels(picture, unsure) > 50 for picture in found] == [False] * 4 + [True]


def test_an_edit_changes_the_gif_where_it_stands(history, tmp_path):
    animation.gif(history, tmp_path / "a.gif")
    before, after = pictures(tmp_path / "a.gif")[0][2:4]
    x = np.flatnonzero(np.any(before[:-60] != after[:-60], axis=(0, 2)))
    assert x.min() < 60, "the first cell"
    plain = history | {"changed": [[1], *history["changed"][1:]]}
    animation.gif(plain, tmp_path / "b.gif")
    others = pictures(tmp_path / "b.gif")[0]
    moved = np.flatnonzero(np.any(others[2][:-40] != others[3][:-40], axis=(0, 2)))
    assert moved.min() > 60, "only another cell"
    longest = [(picture.max(-1) < 80).sum(1).max() for picture in (before, others[2])]
    assert longest[0] > 35 > longest[1], "a line under what will be overwritten"


def test_text_beyond_ascii_is_drawn(history, tmp_path):
    shown = []
    for character in "é☃\U000f0000":
        history["tokens"][4][3] = character
        animation.gif(history, tmp_path / "a.gif")
        shown.append(pictures(tmp_path / "a.gif")[0][-1])
    assert len({picture.tobytes() for picture in shown}) == 3, "no two of them are empty boxes"


def test_long_histories_prompts_and_tokens_are_bounded(history, tmp_path):
    sizes = set()
    for lines in (10, 50):
        long = history | {"prompt": "one more line of the prompt\n" * lines}
        animation.gif(long, tmp_path / "a.gif", width=300)
        sizes.add(pictures(tmp_path / "a.gif")[0][0].shape)
    assert len(sizes) == 1
    animation.gif(history, tmp_path / "a.gif", most_frames=3)
    found, times = pictures(tmp_path / "a.gif")
    assert len(found) == 3 and times[-1] == 3000
    history["tokens"][4][3] = "x" * 500
    animation.gif(history, tmp_path / "a.gif", width=300)
    margin = pictures(tmp_path / "a.gif")[0][-1][:-60, 285:]
    assert (margin > 248).all(), "nothing is drawn over the edge"


def test_bad_arguments_are_named_and_leave_the_file(history, tmp_path):
    path = tmp_path / "a.gif"
    path.write_text("older")
    with pytest.raises(ValueError, match="width=100 must be at least 240"):
        animation.gif(history, path, width=100)
    with pytest.raises(ValueError, match="most_frames=1 must be at least 2"):
        animation.gif(history, path, most_frames=1)
    with pytest.raises(KeyError):
        animation.gif({**history, "confidence": {}}, path)
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=r"a\.gif"):
        animation.gif(history, path)
    assert list(tmp_path.iterdir()) == [path], "nothing half done is left"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        animation.gif(history, tmp_path / "nowhere" / "a.gif")


def test_an_answer_without_steps_is_a_still(decoded, tokenizer, tmp_path):
    still = dataclasses.replace(decoded, steps=np.array([4, 0]), commit_step=decoded.commit_step)
    history = animation.frames(still, 1, tokenizer, tokenizer.mask_id)
    assert history["tokens"] == [[None] * WIDTH]
    animation.gif(history, tmp_path / "a.gif")
    assert len(pictures(tmp_path / "a.gif")[0]) == 1
    assert [cell[0] for cell in Page(animation.html(history, "t")).cells] == ["mask"] * WIDTH

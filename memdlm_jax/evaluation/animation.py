"""A denoising history to look at: an HTML page to step through, or an animated GIF."""

import dataclasses
import functools
import importlib.resources
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from memdlm_jax import storage
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion import decode
from memdlm_jax.diffusion.decode import Decoded

Colour = tuple[int, int, int]
Scale = tuple[Colour, Colour, Colour]

LIGHT: Scale = ((247, 183, 138), (236, 236, 238), (150, 200, 240))
"""Backgrounds of tokens on white, for confidence 0, 1/2 and 1; told apart by the colour-blind."""
DARK: Scale = ((140, 66, 14), (60, 65, 71), (18, 88, 142))
"""The same on black."""

MASK = "░"
_SHOWN = {"\n": "⏎", "\r": "␍", "\t": "⇥"}
_PAPER, _INK, _FAINT, _LINE = (255, 255, 255), (27, 31, 36), (110, 118, 129), (208, 215, 222)


def frames(
    decoded: Decoded, row: int, tokenizer: Tokenizer, mask_token_id: int, prompt: str = ""
) -> dict[str, Any]:
    """How one answer was filled, JSON-ready, step by step; what ``html`` and ``gif`` draw.

    A token's text is its own: of a byte-level vocabulary it may be half a character, U+FFFD. Only
    the last commit of a position is on record: the confidence of a token that was overwritten
    later is not, and its place has the confidence of what replaced it.

    Args:
        decoded: leaves [b, length]; with its ``history``, edits are seen as they happened.
        row: which answer.
        tokenizer: spells the tokens.
        mask_token_id: id of the mask token.
        prompt: text to show above.

    Returns:
        ``prompt``; ``steps``, their number n; ``tokens``, n + 1 lists of texts, ``None`` for a
        mask; and by position ``confidence``, ``commit_step`` (-1 where nothing was committed) and
        ``changed``, indices into ``tokens`` at which another token stands there than before.
    """
    steps = int(np.asarray(decoded.steps)[row])
    ids = decode.history(decoded, mask_token_id)[: steps + 1, row]
    texts = {
        token: None if token == mask_token_id else tokenizer.decode([token], skip_special=False)
        for token in np.unique(ids).tolist()
    }
    confidence = np.asarray(decoded.confidence)[row].tolist()
    changed = (ids[1:] != ids[:-1]).T
    return {
        "prompt": prompt,
        "steps": steps,
        "tokens": [[texts[token] for token in window] for window in ids.tolist()],
        "confidence": [round(min(c, 1.0), 4) if math.isfinite(c) else 0.0 for c in confidence],
        "commit_step": np.asarray(decoded.commit_step)[row].tolist(),
        "changed": [(np.flatnonzero(steps) + 1).tolist() for steps in changed],
    }


def blend(scale: Scale, confidence: float) -> Colour:
    """The colour of a confidence in [0, 1]; what is no number has that of 0."""
    place = 2 * min(max(confidence, 0.0), 1.0) if math.isfinite(confidence) else 0.0
    low, high = scale[:2] if place <= 1 else scale[1:]
    part = place if place <= 1 else place - 1
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return red, green, blue


def shown(text: str) -> str:
    """A token's text with signs for what could not be seen; empty text is one, too."""

    def sign(character: str) -> str:
        invisible = unicodedata.category(character) in ("Cc", "Cs")
        return _SHOWN.get(character, "\ufffd" if invisible else character)

    return "".join(map(sign, text)) or "∅"


@dataclasses.dataclass(frozen=True)
class _Cell:
    """One position of the canvas through all steps.

    Attributes:
        changes: (step from which on it is shown, text or ``None`` for a mask), in order.
        confidence: at its last commit, or ``None`` if there was none.
        title: what a pointer over it says.
    """

    changes: list[tuple[int, str | None]]
    confidence: float | None
    title: str

    def at(self, step: int) -> tuple[str | None, list[str]]:
        """Text after ``step`` steps, ``None`` for a mask, and its marks: ``edited``, ``later``."""
        past = [text for start, text in self.changes if start <= step]
        if not past or past[-1] is None:
            return None, []
        marks = {"edited": len(past) > 1, "later": len(past) < len(self.changes)}
        return past[-1], [name for name, holds in marks.items() if holds]

    @property
    def texts(self) -> list[str]:
        """All that it ever shows; where it stands nothing moves when it changes."""
        return [text for _, text in self.changes if text is not None] or [MASK]

    @property
    def columns(self) -> int:
        """Columns of a fixed-width font that hold the longest text."""
        return max(_columns(text) for text in self.texts)

    def css(self, scale: Scale) -> str:
        """Its colour on a page."""
        return "transparent" if self.confidence is None else _hex(blend(scale, self.confidence))


def _cells(history: Mapping[str, Any]) -> list[_Cell]:
    return [_cell(history, position) for position in range(len(history["tokens"][0]))]


def _cell(history: Mapping[str, Any], position: int) -> _Cell:
    changes: list[tuple[int, str | None]] = []
    for step in history["changed"][position]:
        text = history["tokens"][step][position]
        changes.append((step, None if text is None else shown(text)))
    committed = history["commit_step"][position]
    if committed < 0:
        return _Cell(changes, None, "not decoded: the answer had ended")
    confidence = history["confidence"][position]
    title = f"step {committed + 1}, confidence {confidence:.3f}"
    if len(changes) > 1:
        title += f"; edited, {len(changes)} tokens one after the other"
    return _Cell(changes, confidence, title)


def _columns(text: str) -> int:
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def html(history: Mapping[str, Any], title: str) -> str:
    """One page without any reference to another file or host; without scripts it shows the end.

    Args:
        history: of ``frames``.
        title: its heading.
    """
    source = importlib.resources.files(__package__) / "animation.html.j2"
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        title=title,
        prompt=history["prompt"],
        steps=history["steps"],
        cells=_cells(history),
        light=LIGHT,
        dark=DARK,
        legends=[[_hex(c) for c in LIGHT], [_hex(c) for c in DARK]],
        mask=MASK,
    )


def gif(
    history: Mapping[str, Any],
    path: str | Path,
    *,
    title: str = "",
    width: int = 720,
    frame_ms: int = 150,
    last_ms: int = 3000,
    most_frames: int = 200,
) -> None:
    """Write an animated GIF that runs for ever.

    Text is set in matplotlib's DejaVu Sans Mono; what that lacks (Chinese, say) is an empty box.

    Args:
        history: of ``frames``.
        path: the file; replaced.
        title: its heading.
        width: in pixels; the height is what it takes.
        frame_ms: time of a frame.
        last_ms: time of the last one.
        most_frames: of longer histories so many steps are shown, evenly spread.

    Raises:
        ValueError: the width has no room for a few characters, or there would be no two frames.
    """
    if width < 240:
        raise ValueError(f"width={width} must be at least 240")
    if most_frames < 2:
        raise ValueError(f"most_frames={most_frames} must be at least 2: the first and the last")
    sheet = _Sheet(_cells(history), history["steps"], title, history["prompt"], width)
    count = min(history["steps"] + 1, most_frames)
    steps = np.unique(np.linspace(0, history["steps"], count).round().astype(int)).tolist()
    palette = _palette([sheet.draw(steps[i]) for i in (0, len(steps) // 2, -1)])
    images = (sheet.draw(s).quantize(palette=palette, dither=Image.Dither.NONE) for s in steps)
    times = [frame_ms] * (len(steps) - 1) + [last_ms]
    # In full before it is put there: what cannot be drawn leaves an older file as it was.
    with storage.replacing(storage.path(path)) as file:
        next(images).save(file, "GIF", save_all=True, append_images=images, duration=times, loop=0)


def _palette(images: Sequence[Image.Image]) -> Image.Image:
    """One palette for all frames, so that nothing flickers."""
    high = images[0].height
    stacked = Image.new("RGB", (images[0].width, high * len(images)))
    for i, image in enumerate(images):
        stacked.paste(image, (0, high * i))
    return stacked.quantize(256, Image.Quantize.MEDIANCUT)


_MARGIN, _ROW, _PAD, _GAP, _PROMPT_LINES = 16, 26, 4, 3, 6
"""In pixels, but for the last: of a longer prompt only the end is shown."""


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")
    return ImageFont.truetype(str(path), size)


@dataclasses.dataclass(frozen=True)
class _Sheet:
    """What is drawn on: title, prompt, canvas, legend; only the canvas changes."""

    cells: Sequence[_Cell]
    steps: int
    title: str
    prompt: str
    width: int

    @functools.cached_property
    def heading(self) -> list[str]:
        """Lines of the prompt, with lines of the title before them."""
        room = int((self.width - 2 * _MARGIN) / _font(13).getlength("m"))
        lines = list(_wrapped(self.prompt, room))
        if len(lines) > _PROMPT_LINES:
            lines = ["…", *lines[1 - _PROMPT_LINES :]]
        return [*_wrapped(self.title, room), *lines]

    @functools.cached_property
    def boxes(self) -> list[tuple[float, float, float]]:
        """(left, top, width) of every cell, line by line."""
        x, y = float(_MARGIN), float(_MARGIN + 20 * len(self.heading) + 8)
        room, found = self.width - 2 * _MARGIN, []
        for cell in self.cells:
            wide = max(map(_font(15).getlength, cell.texts)) + 2 * _PAD
            wide = min(wide, room)
            if x + wide > self.width - _MARGIN:
                x, y = float(_MARGIN), y + _ROW + _GAP
            found.append((x, y, wide))
            x += wide + _GAP
        return found

    @functools.cached_property
    def edited(self) -> bool:
        """Whether a token is overwritten."""
        return any(len(cell.changes) > 1 for cell in self.cells)

    def draw(self, step: int) -> Image.Image:
        """The picture after ``step`` steps."""
        bottom = self.boxes[-1][1] + _ROW + 12
        height = int(bottom) + 20 * (1 + self.edited) + _MARGIN
        image = Image.new("RGB", (self.width, height), _PAPER)
        pen = ImageDraw.Draw(image)
        for i, line in enumerate(self.heading):
            pen.text((_MARGIN, _MARGIN + 20 * i), line, _FAINT, _font(13))
        for cell, box in zip(self.cells, self.boxes, strict=True):
            _draw_cell(pen, cell, box, step)
        self._draw_legend(pen, bottom, step)
        return image

    def _draw_legend(self, pen: ImageDraw.ImageDraw, y: float, step: int) -> None:
        pen.text((_MARGIN, y), "confidence 0", _FAINT, _font(12))
        left = _MARGIN + int(_font(12).getlength("confidence 0")) + 6
        for x in range(80):
            pen.line((left + x, y + 2, left + x, y + 14), blend(LIGHT, x / 79))
        pen.text((left + 86, y), "1", _FAINT, _font(12))
        end = self.width - _MARGIN
        pen.text((end, y), f"step {step} of {self.steps}", _FAINT, _font(12), anchor="ra")
        if self.edited:
            note = "underlined: thick, overwrote a token; thin, is overwritten later"
            pen.text((_MARGIN, y + 20), note, _FAINT, _font(12))


def _draw_cell(
    pen: ImageDraw.ImageDraw, cell: _Cell, box: tuple[float, float, float], step: int
) -> None:
    x, y, wide = box
    text, marks = cell.at(step)
    edges = (x, y, x + wide - 1, y + _ROW - 1)
    if text is None:
        pen.rectangle(edges, (246, 248, 250), _LINE)
        return
    colour = _PAPER if cell.confidence is None else blend(LIGHT, cell.confidence)
    pen.rectangle(edges, colour)
    if marks:
        pen.line((x, y + _ROW - 2, x + wide - 1, y + _ROW - 2), _INK, 2 if "edited" in marks else 1)
    while len(text) > 1 and _font(15).getlength(text) > wide - 2 * _PAD:
        text = text[:-2] + "…"
    pen.text((x + _PAD, y + _ROW / 2), text, _INK, _font(15), anchor="lm")


def _wrapped(text: str, columns: int) -> Iterator[str]:
    """Lines of at most so many columns; a break may fall anywhere."""
    for line in text.splitlines():
        now, used = "", 0
        for character in shown(line) if line else "":
            if used + _columns(character) > columns:
                yield now
                now, used = "", 0
            now, used = now + character, used + _columns(character)
        yield now

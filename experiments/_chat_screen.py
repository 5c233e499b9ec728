"""What a chat looks like: a terminal with a canvas to watch, or plain lines."""

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.evaluation import animation

FOREGROUND: animation.Scale = ((214, 94, 0), (138, 138, 138), (30, 136, 210))
"""Of tokens with confidence 0, 1/2 and 1; legible on black and on white."""


def _style(confidence: float) -> str:
    red, green, blue = animation.blend(FOREGROUND, confidence)
    return f"rgb({red},{green},{blue})"


def painted(
    tokenizer: Tokenizer, tokens: np.ndarray, confidence: np.ndarray, mask_token_id: int
) -> Text:
    """Tokens in the colour of their confidence, masks as dim blocks; [n] each.

    Tokens that are parts of one character are shown together, in the colour of the first.
    """
    text, at, ids = Text(), 0, tokens.tolist()
    while at < len(ids):
        if ids[at] == mask_token_id:
            text.append(f"{animation.MASK} ", "dim")
            at += 1
            continue
        said, count = tokenizer.decode([ids[at]], skip_special=False), 1
        for more in range(2, 5) if "\ufffd" in said else ():
            part = ids[at : at + more]
            whole = tokenizer.decode(part, skip_special=False)
            if "\ufffd" not in whole:
                said, count = whole, len(part)
                break
        # Line breaks are text; other control characters would command the terminal.
        said = "\n".join(animation.shown(line) if line else "" for line in said.split("\n"))
        text.append(said, _style(float(confidence[at])))
        at += count
    return text


class Screen:
    """Standard output: a terminal with a canvas to watch, or a plain line per reply."""

    def __init__(self, out: Console, pause: float = 0.0):
        """Keep where to write and how long to rest between two pictures."""
        self.out, self.pause = out, pause
        self.aside = out if out.is_terminal else Console(stderr=True)
        self.typed = out.is_terminal and sys.stdin.isatty()

    def greet(self, text: str) -> None:
        """Say hello and, where there are colours, what they mean."""
        self.note(text)
        if self.out.is_terminal:
            bar = [("██", _style(i / 8)) for i in range(9)]
            self.out.print(Text.assemble(("confidence 0 ", "dim"), *bar, (" 1", "dim")))

    def note(self, text: str, style: str = "dim") -> None:
        """What is not the model's, in one line however long."""
        self.aside.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def watched(self) -> Iterator[Callable[[Text], None]]:
        """Gives what shows a picture in the place of the one before; gone at the end."""
        if not self.out.is_terminal:
            yield lambda picture: None
            return
        with Live(console=self.out, auto_refresh=False, transient=True) as live:

            def show(picture: Text) -> None:
                live.update(picture, refresh=True)
                time.sleep(self.pause)

            yield show

    def reply(self, text: str, picture: Text) -> None:
        """The whole reply."""
        if self.out.is_terminal:
            self.out.print(picture if picture.plain.strip() else Text("(empty reply)", "dim"))
        else:
            print(" ".join(text.splitlines()), file=self.out.file, flush=True)

    def lines(self) -> Iterator[str]:
        """What the user types, or what is piped in, up to its end; empty lines are left out."""
        if self.typed:
            with contextlib.suppress(ImportError):
                importlib.import_module("readline")  # Keys that edit and recall what was typed.
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            while line := f"{input('> ')}\n" if self.typed else sys.stdin.readline():
                if self.out.is_terminal and not self.typed:
                    self.note(f"> {animation.shown(line.rstrip())}")
                if line.strip():
                    yield line.strip()

"""Talk to a model folder in the terminal, and watch its replies being denoised.

    python -m experiments.chat --config.model=MODEL
    python -m experiments.chat --config.model=MODEL --memory
    python -m experiments.chat --config.model=MODEL < questions.txt > replies.txt

``--memory`` (``--config.memory.enabled=True``) writes the conversation into memory before every
reply, and says what that cost. Without a terminal, standard output has one line per reply, line
breaks as spaces, and all else goes to standard error. ``/help`` lists the commands.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_dict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments import _cli, _memory, _model
from experiments._chat_model import UNBOUNDED, Answerer, encoded, fit, padded
from experiments._chat_screen import Screen, painted
from memdlm_jax import storage
from memdlm_jax.data.episodes import encode_text
from memdlm_jax.data.example import Message
from memdlm_jax.diffusion.decode import Decoded
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation import animation, spectrum
from memdlm_jax.evaluation.systems import replies, stopping
from memdlm_jax.inference.generation import Generator
from memdlm_jax.memory import written
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop, InnerParameters, inner_loop_for
from memdlm_jax.typing import Phi

HELP = """\
/help                   this list
/read FILE              write a text file into memory; replies then use it without seeing it
/forget                 start over, and forget the file
/memory [on | off]      write the conversation into memory before every reply, or not
/memory show            what the last prompt wrote, matrix by matrix
/save PATH.html | .gif  how the last reply was denoised
/quit                   leave; so does the end of the input"""


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """All settings of a conversation.

    Attributes:
        model: model folder: config.json or a PEFT adapter, safetensors, tokenizer.
        decode: the sampler; replies also stop at the tokenizer's ends of turn and sequence.
        memory: how prompts are written into memory, ``None`` for none until ``/memory on``.
        standby: what ``/memory on`` then takes; ``None`` for the model folder's settings.
        seed: of memory and sampling noise.
        max_length: longest canvas in tokens; 0 is what the model is meant for.
        dtype: of the activations, and of the parameters unless ``base`` says otherwise.
        base: how parameters are held; ``int8`` and ``nf4`` hold the layers' matrices as codes.
        under: model folder under one that holds an adapter; empty is the one that it names.
        export: .html or .gif file of the last reply's denoising; empty for none.
        pause: seconds to rest after each step in a terminal, so that it can be watched.
    """

    model: str
    decode: DecodeConfig
    memory: MemoryConfig | None = None
    standby: MemoryConfig | None = None
    seed: int = 0
    max_length: int = 0
    dtype: _model.Dtype = "float32"
    base: _model.Base | None = None
    under: str = ""
    export: str = ""
    pause: float = 0.0

    def __post_init__(self):
        if not self.model:
            raise ValueError("model='' must name a model folder")
        for name in ("seed", "max_length", "pause"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if self.export:
            check_export("export", self.export)


def from_config_dict(config: config_dict.ConfigDict) -> ChatConfig:
    """Build the settings; ``memory`` holds changes to those that the model was trained with.

    Raises:
        KeyError, TypeError, ValueError: naming the field, see ``_cli.build``.
    """
    settings = config.to_dict()
    _cli.drop_distributed(settings)
    _model.resolve(settings, "model", "under")
    enabled = settings["memory"].pop("enabled", True)
    if type(enabled) is not bool:
        raise TypeError(f"config.memory.enabled={enabled!r} must be bool")
    changed = any(value is not None for value in settings["memory"].values())
    folder = settings["model"] if enabled or changed else ""
    memory = _memory.settings(folder, settings["memory"])
    settings["memory"] = memory if enabled else None
    settings["standby"] = memory if changed else None
    return _cli.build(ChatConfig, settings)


def check_export(name: str, path: str) -> None:
    """Raise ValueError if this is no name of a picture."""
    if storage.path(path).suffix not in (".html", ".gif"):
        raise ValueError(f"{name}={path!r} must end in .html or .gif")


def export(history: dict[str, Any], path: str) -> None:
    """Write a denoising history as the page or GIF that its name says; folders are made.

    Raises:
        OSError, ValueError: it cannot be written there, or it is neither.
    """
    check_export("path", path)
    file = storage.path(path).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".gif":
        animation.gif(history, file, title="A reply, denoised")
    else:
        file.write_text(animation.html(history, "A reply, denoised"), encoding="utf-8")


class Chat:
    """A conversation: the model, what was said, and what the last reply left behind."""

    def __init__(self, config: ChatConfig, screen: Screen):
        """Load the model folder.

        Raises:
            FileNotFoundError, ValueError: see ``_model.load``; or the canvas has no room.
        """
        self.config, self.screen = config, screen
        self.denoiser, self.theta, self.tokenizer = _model.load(
            config.model, config.dtype, config.base, config.under
        )
        self.decode = stopping(config.decode, self.tokenizer)
        self.max_length = config.max_length or self.denoiser.config.max_length
        self.room = self.max_length - self.decode.length
        if self.room < 1:
            raise ValueError(
                f"decode.length={self.decode.length} must be less than max_length={self.max_length}"
            )
        self.history: dict[str, Any] | None = None
        self._answerers: dict[MemoryConfig | None, Answerer] = {}
        self.forget()
        self.switch(config.memory)

    def forget(self) -> None:
        """Start over."""
        self.turns: list[Message] = []
        self.left_out = 0  # Oldest turns that the model is no longer shown.
        self.phi: Phi = None
        self.document: Phi = None  # Memory of a file that was read.

    def switch(self, memory: MemoryConfig | None) -> None:
        """Write prompts like this from now on, or not at all.

        Raises:
            FileNotFoundError, ValueError: the folder lacks learned parts, or pieces are too long.
        """
        if memory not in self._answerers:
            inner_loop = inner_loop_for(self.denoiser, memory)
            generator = Generator(self.denoiser, inner_loop, self.decode)
            self._answerers[memory] = Answerer(generator, self.theta, self._learned(memory))
        self.memory, self.answerer = memory, self._answerers[memory]

    def read(self, file: str) -> int:
        """Write a text file into memory, for all replies from now on; how many tokens it has.

        Nothing else is written until ``forget``.

        Raises:
            FileNotFoundError, UnicodeDecodeError: there is no such text.
            ValueError: it is empty, or the model was not trained to write texts in segments.
        """
        config = self.config
        memory = self.memory or config.standby or _memory.settings(config.model, {})
        if not memory.prompt_chunk:
            raise ValueError(
                "memory.prompt_chunk=0 must be set: the model was not trained to write texts in "
                "segments, see experiments.written_memory"
            )
        text = storage.read_text(storage.path(file).expanduser(), "utf-8-sig")
        texts = encode_text(self.tokenizer, text, memory.prompt_chunk)
        self.switch(memory)
        loop = InnerLoop(self.denoiser, memory)

        def write(key, theta, texts, learned):
            return written.write_texts(key, loop, theta, texts, learned)[0]

        key = jax.random.key(config.seed)
        self.document = jax.jit(write)(key, self.theta, texts, self._learned(memory))
        self.phi = self.document
        return int(texts.valid.sum())

    def _learned(self, memory: MemoryConfig | None) -> InnerParameters | None:
        if memory is None:
            return None
        if memory.prompt_chunk > self.max_length:
            raise ValueError(
                f"memory.prompt_chunk={memory.prompt_chunk} must be at most "
                f"max_length={self.max_length}"
            )
        return _memory.inner_parameters(self.config.model, self.denoiser, memory)

    def say(self, message: str) -> None:
        """Answer a message; it and the reply become part of the conversation.

        Raises:
            ValueError: it does not fit; the conversation stays as it was.
        """
        turns: list[Message] = [*self.turns, ("user", message)]
        ids, more = fit(self.tokenizer, turns[self.left_out :], self.room)
        if more:
            self.left_out += more
            still = ", but still written into memory" if self._in_pieces else ""
            self.screen.note(f"the conversation is too long: {more} oldest turns left out{still}")
        with self.screen.watched() as show:
            show(Text("reading …", "dim"))
            decoded, self.phi, cost = self.answerer.answer(
                jax.random.fold_in(jax.random.key(self.config.seed), len(self.turns) // 2)[None],
                padded(self.tokenizer, ids, self.room),
                padded(self.tokenizer, self._written(ids, turns), UNBOUNDED),
                lambda seen: show(self._picture(seen)),
                self.document,
            )
        said = replies(self.tokenizer, decoded, self.decode.stop)
        reply = said.texts[0]
        self.screen.reply(reply, self._picture(decoded, int(said.lengths[0])))
        if cost:
            self.screen.note(str(cost))
        prompt = self.tokenizer.decode(ids, skip_special=False)
        mask = self.denoiser.mask_token_id
        self.history = animation.frames(decoded, 0, self.tokenizer, mask, prompt)
        self.turns = [*turns, ("assistant", reply)]

    @property
    def _in_pieces(self) -> bool:
        return self.memory is not None and self.memory.prompt_chunk > 0

    def _written(self, ids: list[int], turns: Sequence[Message]) -> list[int]:
        """What memory gets: the prompt, or in pieces also what has no room in the prompt."""
        return encoded(self.tokenizer, turns) if self._in_pieces else ids

    def _picture(self, decoded: Decoded, length: int | None = None) -> Text:
        leaves = decoded.tokens, decoded.confidence, decoded.commit_step
        tokens, confidence, commit_step = (np.asarray(leaf)[0, :length] for leaf in leaves)
        mask = self.denoiser.mask_token_id
        # At the end, what was not decoded is filled up.
        tokens = np.where(commit_step < 0, mask, tokens)
        return painted(self.tokenizer, tokens, confidence, mask)

    def table(self) -> Table:
        """What the last prompt wrote, matrix by matrix; of many experts the mean."""
        table = Table("matrix", "layer", "norm", "effective rank")
        first = self.answerer.generator.split
        for path, found in spectrum.describe(self.phi).items():
            norm, rank = (
                np.asarray(found[name])[0].reshape(found[name].shape[1], -1).mean(1)
                for name in ("norm", "rank")
            )
            for i in range(len(norm)):
                table.add_row(path, str(first + i), f"{norm[i]:.4g}", f"{rank[i]:.2f}")
        return table


def command(chat: Chat, line: str) -> bool:
    """Do what a line that begins with a slash says; whether to go on.

    Raises:
        OSError, ValueError: it cannot be done, or there is no such command.
    """
    name, _, rest = line.partition(" ")
    match name, rest.strip():
        case "/quit", "":
            return False
        case "/help", "":
            chat.screen.note(HELP)
        case "/forget", "":
            chat.forget()
            chat.screen.note("everything is forgotten")
        case "/read", file if file:
            count = chat.read(file)
            chat.screen.note(f"{count} tokens of {file} are in memory; /memory off answers without")
        case "/memory", "show":
            if chat.phi is None:
                raise ValueError("nothing has been written into memory yet")
            chat.screen.aside.print(chat.table())
        case "/memory", "" | "on" | "off" as wanted:
            on = wanted == "on" or (not wanted and chat.memory is None)
            config = chat.config
            settings = config.memory or config.standby
            chat.switch((settings or _memory.settings(config.model, {})) if on else None)
            chat.screen.note(f"memory is {'on' if on else 'off'}")
        case "/save", path if path:
            if chat.history is None:
                raise ValueError("there is no reply to save yet")
            export(chat.history, path)
            chat.screen.note(f"saved {path}")
        case _:
            raise ValueError(f"{line!r} is no command; /help lists them")
    return True


def main(config: ChatConfig, out: Console | None = None) -> None:
    """Run from the command line; ``out`` is standard output."""
    screen = Screen(out or Console(), config.pause)
    chat = Chat(config, screen)
    screen.greet(f"{config.model}; /help lists the commands")
    try:
        for line in screen.lines():
            try:
                if not line.startswith("/"):
                    chat.say(line)
                elif not command(chat, line):
                    break
            except (OSError, ValueError) as error:
                screen.note(f"error: {error}", "red")
            except KeyboardInterrupt:
                if not screen.typed:
                    break
                screen.note("stopped; the message is forgotten")
    finally:
        if config.export and chat.history:
            export(chat.history, config.export)


def run() -> None:
    """``main`` with the flags of the command line."""
    memory = flags.DEFINE_boolean("memory", None, "Short for --config.memory.enabled=True.")

    def parse(config: config_dict.ConfigDict) -> ChatConfig:
        if memory.value is not None:
            config.memory.enabled = memory.value
        return from_config_dict(config)

    alone = "a conversation is held in one process; experiments.generate answers prompts in several"
    _cli.run(parse, main, "experiments/configs/chat.py", alone)


if __name__ == "__main__":
    run()

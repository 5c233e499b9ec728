"""Byte-level BPE over the ``tokenizers`` library: trained from text, round-trips any text."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from memdlm_jax import storage
from memdlm_jax.data import tokenizer_files
from memdlm_jax.data.chat import ChatMessages, ChatTemplate, hide, split_hidden
from memdlm_jax.data.example import TURN_TOKENS
from memdlm_jax.data.tokenizer_files import OUR_TOKENS, SpecialTokens
from memdlm_jax.progress import Progress

# GPT-style split. Digits come in groups of up to three and never share a piece with a space, so a
# number has the same token wherever it stands; a line break never joins the punctuation before it,
# so text may be tokenised line by line.
_PIECES = (
    r"'(?:[sdmtSDMT]|ll|ve|re|LL|VE|RE)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NUM_BYTES = 256
_ALWAYS = ("pad", "mask", "eos", "user", "assistant")
"""Special tokens in every digest, found or not."""


class Tokenizer:
    """Text to ids and back.

    Text is only ever text: ``encode("<|mask|>")`` gives the ids of those eight characters, never
    the special id, so user text cannot forge a turn or a mask. Special ids are put in by id, or by
    a chat template (``chat_ids``). The switch for this (``encode_special_tokens``) is not stored in
    ``tokenizer.json``: a program that opens the file without this class has to set it itself.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: SpecialTokens | None = None,
        chat: ChatTemplate | None = None,
    ):
        """Wrap ``backend``.

        Args:
            backend: a tokenizer whose vocabulary holds the special tokens.
            special: their spelling, of mask, eos and pad at least; ``None`` is ours.
            chat: template of conversations; ``None`` opens turns with ``special.user`` and
                ``special.assistant``.

        Raises:
            ValueError: a special token is not in the vocabulary.
        """
        special = special or OUR_TOKENS
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.special = special
        self.chat = chat
        self.pad_id = _special_id(backend, "pad", special.pad)
        self.mask_id = _special_id(backend, "mask", special.mask)
        self.eos_id = _special_id(backend, "eos", special.eos)
        self._ids = {
            name: _special_id(backend, name, token)
            for name, token in dataclasses.asdict(special).items()
            if token
        }
        self._controls = _control_tokens(backend, special, chat)
        self._text_backend = _text_backend(backend, self._controls)

    @property
    def user_id(self) -> int:
        """Id that opens a user's turn; ValueError if a chat template has to do that."""
        return self._opening_id("user")

    @property
    def assistant_id(self) -> int:
        """Id that opens the model's turn; ValueError if a chat template has to do that."""
        return self._opening_id("assistant")

    @property
    def bos_id(self) -> int | None:
        """Id that opens a text; ``None`` if the tokenizer knows none."""
        return self._ids.get("bos")

    @property
    def end_of_turn_id(self) -> int:
        """Id that ends a turn and a response: ``eos_id`` unless the template has another."""
        return self._ids.get("end_of_turn", self.eos_id)

    @functools.cached_property
    def turn_tokens(self) -> int:
        """Tokens of a row with one user turn beside its texts, at most.

        A template joins texts with line breaks that may merge with them: two more are allowed for.
        """
        if self.chat is None:
            return TURN_TOKENS
        turn = self.chat_ids([{"role": "user", "content": "a"}])
        return len(turn) - len(self.encode("a")) + 1 + 2

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: ids lie in [0, vocab_size)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of a text; nothing is added.

        Args:
            text: any text without lone surrogates.
            allow_special: let the spelling of a special token become its id, as the public
                tokenizers do; for text of one's own, such as a rendered template. Otherwise no id
                is special.
        """
        backend = self._recognising if allow_special else self._text_backend
        return backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of many texts at once, in parallel."""
        encoded = self._text_backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [row.ids for row in encoded]

    def chat_ids(self, messages: ChatMessages, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation, rendered by the chat template.

        They are those of ``encode(rendered text, allow_special=True)``, except that special tokens
        come from the template alone: where the content of a message spells one, those characters
        are encoded as text.

        Args:
            messages: oldest first, each with the keys ``role`` and ``content``.
            add_generation_prompt: end with what opens the model's turn.

        Raises:
            ValueError: there is no template, or it fails on the conversation.
        """
        if self.chat is None:
            raise ValueError(f"{self._no_opening('chat template')}, or chat_template=...")
        texts = [message["content"] for message in messages]
        spans = [self._spelled(text) for text in texts]
        hidden, marks = hide(texts, spans)
        plain = [text[a:b] for text, places in zip(texts, spans, strict=True) for a, b in places]
        inert = [{**m, "content": text} for m, text in zip(messages, hidden, strict=True)]
        pieces = split_hidden(self.chat.render(inert, add_generation_prompt), marks)
        ids = (
            self.encode(piece, allow_special=True)
            if isinstance(piece, str)
            else self.encode(plain[piece])
            for piece in pieces
        )
        return [token for piece in ids for token in piece]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ``ids``; the inverse of ``encode`` for any text that the tokenizer keeps.

        Ours keeps any text without lone surrogates; a public one may normalise it (NFC).

        Args:
            ids: ids in [0, vocab_size).
            skip_special: leave out special tokens instead of spelling them.

        Returns:
            The text; bytes that are no UTF-8 (a sequence cut inside a character) become U+FFFD.
        """
        named = set(self._ids.values()) if skip_special else set()
        kept = [i for i in map(int, ids) if i not in named]
        return self._backend.decode(kept, skip_special_tokens=skip_special)

    def token(self, token_id: int) -> str:
        """Spelling of one id in the vocabulary (byte-level: a space is ``Ġ``); empty if none."""
        return self._backend.id_to_token(token_id) or ""

    def digest(self) -> str:
        """Sha256 in hex of the canonical JSON, special tokens and chat template.

        Equal iff ids mean the same and conversations become the same ids.
        """
        names = {k: v for k, v in dataclasses.asdict(self.special).items() if v or k in _ALWAYS}
        content = self._backend.to_str(pretty=False) + json.dumps(names, sort_keys=True)
        if self.chat:
            content += json.dumps(dataclasses.asdict(self.chat), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json`` to ``path`` (a file); parent folders are made.

        What ``load`` could not find by itself, the special tokens and chat template of a public
        tokenizer, is written beside it as ``tokenizer_config.json``.

        Raises:
            ValueError: something is to be written beside a file that is not ``tokenizer.json``.
        """
        path, beside = storage.path(path), self.special != OUR_TOKENS or self.chat is not None
        if beside and path.name != "tokenizer.json":
            raise ValueError(
                f"path={str(path)!r} must end in tokenizer.json: its special tokens and chat "
                "template are kept beside it"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self._backend.to_str(pretty=False), encoding="utf-8")
        if beside:
            config = tokenizer_files.config_to_save(self.special, self.chat)
            text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
            path.with_name("tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls,
        path: str | Path,
        special: SpecialTokens | None = None,
        digest: str = "",
        chat_template: str | None = None,
    ) -> "Tokenizer":
        """Read a tokenizer, ours or that of a public model.

        Args:
            path: a ``tokenizer.json``, or a model folder (see ``tokenizer_files.read``).
            special: spelling of the special tokens; fields left empty, and all if ``None``, are
                looked up by the rules of ``tokenizer_files.find_special``.
            digest: what ``digest()`` has to be; empty accepts any tokenizer.
            chat_template: Jinja text, such as ``chat.LLADA``; empty is no template; ``None`` looks
                it up by the rules of ``tokenizer_files.find_template``.

        Raises:
            FileNotFoundError: there is no tokenizer.
            ValueError: a file is broken, a special token is missing, the template is no Jinja, or
                it is another tokenizer than the one asked for.
        """
        files, asked = tokenizer_files.read(path), special or SpecialTokens()
        template = tokenizer_files.find_template(files, chat_template, asked)
        found = tokenizer_files.find_special(files, asked, template)
        names = {f"{name}_token": getattr(found, name) for name in ("pad", "mask", "eos", "bos")}
        variables = files.declared() | {key: token for key, token in names.items() if token}
        loaded = cls(files.backend, found, ChatTemplate(template, variables) if template else None)
        if digest and loaded.digest() != digest:
            raise ValueError(
                f"{path} has digest {loaded.digest()}, but {digest} was asked for: ids of another "
                "tokenizer mean other text"
            )
        return loaded

    def _opening_id(self, role: str) -> int:
        """Id of the token that opens a turn."""
        if role not in self._ids:
            raise ValueError(self._no_opening(f"token that opens a turn of the {role}"))
        return self._ids[role]

    def _no_opening(self, what: str) -> str:
        """Why a turn cannot be opened."""
        return (
            f"this tokenizer has no {what}; load it with "
            "special=SpecialTokens(user=..., assistant=...)"
        )

    @functools.cached_property
    def _recognising(self) -> tokenizers.Tokenizer:
        """A copy of the backend that turns the spelling of special tokens into their ids."""
        return tokenizers.Tokenizer.from_str(self._backend.to_str())

    def _spelled(self, text: str) -> list[tuple[int, int]]:
        """Where a text spells special tokens, as (start, end) in characters."""
        found = self._recognising.encode(text, add_special_tokens=False)
        pairs = zip(found.ids, found.offsets, strict=True)
        return [span for token_id, span in pairs if token_id in self._controls]


def _control_tokens(
    backend: tokenizers.Tokenizer, special: SpecialTokens, chat: ChatTemplate | None
) -> dict[int, AddedToken]:
    """Added tokens that text must not forge: flagged as special, named, or in the template."""
    named = set(dataclasses.asdict(special).values())
    source = chat.source if chat else ""
    added = backend.get_added_tokens_decoder().items()
    return {
        i: token
        for i, token in added
        if token.special or token.content in named or token.content in source
    }


def _text_backend(
    backend: tokenizers.Tokenizer, controls: dict[int, AddedToken]
) -> tokenizers.Tokenizer:
    """The backend, or a copy for which all control tokens are special, so that text is text."""
    unflagged = [token.content for token in controls.values() if not token.special]
    if not unflagged:
        return backend
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.add_special_tokens(unflagged)
    copy.encode_special_tokens = True
    return copy


def _special_id(backend: tokenizers.Tokenizer, name: str, token: str) -> int:
    """Id of one special token."""
    found = backend.token_to_id(token)
    if found is None:
        raise ValueError(f"special.{name}={token!r} is not in the tokenizer's vocabulary")
    return found


def train_tokenizer(texts: Iterable[str], vocab_size: int, whole_numbers: bool = True) -> Tokenizer:
    """Train a byte-level BPE; the same texts in the same order give the same tokenizer.

    Args:
        texts: training text; any iterable, read once.
        vocab_size: wanted number of ids. The result is smaller when the text has fewer merges.
        whole_numbers: make every number 10 .. 999 one token. This takes 990 ids, whatever the text.

    Returns:
        A tokenizer with ids: special tokens, 256 bytes, merges of the text, numbers.

    Raises:
        ValueError: ``vocab_size`` has no room for the special tokens, bytes and numbers, or
            ``texts`` is empty.
    """
    numbers = _number_merges() if whole_numbers else []
    special = [token for token in dataclasses.asdict(OUR_TOKENS).values() if token]
    room = vocab_size - len(numbers)
    if room < len(special) + _NUM_BYTES:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {len(special) + _NUM_BYTES + len(numbers)}"
            f" with whole_numbers={whole_numbers}"
        )
    with Progress("training a tokenizer", unit="text") as bar:
        counted = _counted(texts, bar)
        vocab, merges = _learn_merges(counted, room, special, whole_numbers)
    for left, right in numbers:
        vocab[left + right] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges + numbers))
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return Tokenizer(backend)


def _learn_merges(
    texts: Iterable[str], vocab_size: int, special: list[str], skip_numbers: bool
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges that the text alone asks for."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = _pre_tokenizer(skip_numbers)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    model: dict[str, Any] = json.loads(learner.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _pre_tokenizer(skip_numbers: bool = False) -> pre_tokenizers.PreTokenizer:
    """Split into pieces that no merge crosses; optionally leave numbers out of the training."""
    split = pre_tokenizers.Split(tokenizers.Regex(_PIECES), "isolated")
    numbers = pre_tokenizers.Split(tokenizers.Regex(r"\p{N}"), "removed")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, *([numbers] if skip_numbers else []), as_bytes])


@functools.cache
def _number_merges() -> list[tuple[str, str]]:
    """Merges that make each of 10 .. 999 one token."""
    pairs = [divmod(number, 10) for number in range(10, 100)]
    merges = [(str(a), str(b)) for a, b in pairs]
    for number in range(100, 1000):
        a, b, c = list(str(number))
        # BPE applies the earlier merge first: "21" before "32" leaves 321 as "3" + "21".
        right_first = b != "0" and (b, c) < (a, b)
        merges.append((a, b + c) if right_first else (a + b, c))
    return merges


def _counted(texts: Iterable[str], bar: Progress) -> Iterator[str]:
    """The texts, counted; there must be one."""
    for text in texts:
        yield text
        bar.update()
    if not bar.done:
        raise ValueError("texts is empty: a tokenizer needs text to train on")

"""Byte-level BPE over the ``tokenizers`` library: trained from text, round-trips any text."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

# GPT-style split. Digits come in groups of up to three and never share a piece with a space, so a
# number has the same token wherever it stands; a line break never joins the punctuation before it,
# so text may be tokenised line by line.
_PIECES = (
    r"'(?:[sdmtSDMT]|ll|ve|re|LL|VE|RE)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NUM_BYTES = 256


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Spelling of the special tokens in a tokenizer's vocabulary.

    A tokenizer trained here gives them the ids 0 to 4 in this order; a foreign ``tokenizer.json``
    may spell them otherwise and keep them anywhere.

    Attributes:
        pad: fills a row after its end; never attended to.
        mask: the absorbing state of the forward process.
        eos: ends a turn, and the response.
        user: opens a turn of the user.
        assistant: opens a turn of the model.
    """

    pad: str = "<|pad|>"
    mask: str = "<|mask|>"
    eos: str = "<|eos|>"
    user: str = "<|user|>"
    assistant: str = "<|assistant|>"


class Tokenizer:
    """Text to ids and back.

    Text is only ever text: ``encode("<|mask|>")`` gives the ids of those eight characters, never
    the special id, so user text cannot forge a turn or a mask. Special ids are put in by id.
    The switch for this (``encode_special_tokens``) is not stored in ``tokenizer.json``: a program
    that opens the file without this class has to set it itself.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: SpecialTokens | None = None):
        """Wrap ``backend``.

        Args:
            backend: a tokenizer whose vocabulary holds the special tokens.
            special: their spelling; ``None`` is ours.

        Raises:
            ValueError: a special token is not in the vocabulary.
        """
        special = special or SpecialTokens()
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.special = special
        self.pad_id = _special_id(backend, "pad", special.pad)
        self.mask_id = _special_id(backend, "mask", special.mask)
        self.eos_id = _special_id(backend, "eos", special.eos)
        self.user_id = _special_id(backend, "user", special.user)
        self.assistant_id = _special_id(backend, "assistant", special.assistant)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: ids lie in [0, vocab_size)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; nothing is added and no id is special."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of many texts at once, in parallel."""
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [row.ids for row in encoded]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ``ids``; the inverse of ``encode`` for any text without lone surrogates.

        Args:
            ids: ids in [0, vocab_size).
            skip_special: leave out special tokens instead of spelling them.

        Returns:
            The text; bytes that are no UTF-8 (a sequence cut inside a character) become U+FFFD.
        """
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token(self, token_id: int) -> str:
        """Spelling of one id in the vocabulary (byte-level: a space is ``Ġ``); empty if none."""
        return self._backend.id_to_token(token_id) or ""

    def digest(self) -> str:
        """Sha256 in hex of the canonical JSON and special tokens: equal iff ids mean the same."""
        names = json.dumps(dataclasses.asdict(self.special), sort_keys=True)
        content = self._backend.to_str(pretty=False) + names
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json`` to ``path`` (a file); parent folders are made."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(path), pretty=False)

    @classmethod
    def load(
        cls, path: str | Path, special: SpecialTokens | None = None, digest: str = ""
    ) -> "Tokenizer":
        """Read a ``tokenizer.json``, ours or a foreign one.

        Args:
            path: the file.
            special: spelling of the special tokens; ``None`` is ours.
            digest: what ``digest()`` has to be; empty accepts any tokenizer.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is no ``tokenizer.json``, lacks a special token, or is another
                tokenizer than the one asked for.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no tokenizer at {path}; train one with train_tokenizer")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        loaded = cls(backend, special)
        if digest and loaded.digest() != digest:
            raise ValueError(
                f"{path} has digest {loaded.digest()}, but {digest} was asked for: ids of another "
                "tokenizer mean other text"
            )
        return loaded


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
    special = list(dataclasses.asdict(SpecialTokens()).values())
    room = vocab_size - len(numbers)
    if room < len(special) + _NUM_BYTES:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {len(special) + _NUM_BYTES + len(numbers)}"
            f" with whole_numbers={whole_numbers}"
        )
    vocab, merges = _learn_merges(_non_empty(texts), room, special, whole_numbers)
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


def _non_empty(texts: Iterable[str]) -> Iterable[str]:
    """The texts, after checking that there is one."""
    iterator = iter(texts)
    first = next(iterator, None)
    if first is None:
        raise ValueError("texts is empty: a tokenizer needs text to train on")
    yield first
    yield from iterator

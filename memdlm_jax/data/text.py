"""Plain text helpers: white space, sentences, and splits that never move."""

import hashlib
import re
from typing import Literal, get_args

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s+[\"'(\[]*[A-Z])")
_ABBREVIATION = re.compile(r"(?:^|\s)(?:Mr|Mrs|Ms|Dr|St|Prof|Rev|Capt|vs|e\.g|i\.e|[A-Z])\.$")


def one_space(text: str) -> str:
    """The text on one line, with single spaces and none at the ends."""
    return " ".join(text.split())


def split_sentences(text: str) -> list[str]:
    """Sentences of English prose, each on one line; abbreviations such as "Mrs." end none."""
    text = one_space(text)
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    ends = [end for end in ends if not _ABBREVIATION.search(text[:end][-12:])]
    bounds = zip([0, *ends], [*ends, len(text)], strict=True)
    return [sentence for start, end in bounds if (sentence := text[start:end].strip())]


def stable_split(name: str, train: float, validation: float) -> Split:
    """The split of a thing by the hash of its name: no seed, no order, no neighbours.

    Args:
        name: what identifies the thing (a conversation, a word).
        train: share of the training split, in [0, 1].
        validation: share of the validation split; the test split has the rest.
    """
    digest = hashlib.sha256(name.encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    if place < train:
        return "train"
    return "validation" if place < train + validation else "test"


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}")

"""Where examples come from: dialogues, own JSON lines, folders of text, needle episodes.

Every source divides its material by group (a conversation, a section of a text) with a hash of the
group's name, 90 / 5 / 5 between training, validation and test: no part of a conversation is ever in
two splits, and adding material moves nothing that is already there.
"""

import functools
import hashlib
import importlib.resources
import json
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from memdlm_jax import storage
from memdlm_jax.data.example import Example, Message
from memdlm_jax.data.needles import NeedleTask
from memdlm_jax.data.text import Split, one_space, split_sentences, stable_split
from memdlm_jax.data.tokenizer import Tokenizer

SECTION_SENTENCES = 200
"""Sentences of a text file that stay together in one split."""

Pair = tuple[str | tuple[Message, ...], str]

_LONGEST_WORD = 30
_TEXT_SUFFIXES = (".txt", ".md", ".rst")
_RUN = re.compile(r"(.)\1{3,}")


def split_of(group: str) -> Split:
    """The split of a group: 90 % training, 5 % validation, 5 % test, for good."""
    return stable_split(f"group:{group}", 0.9, 0.05)


def chitchat_turns() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Cleaned conversations of the package ``chitchat_dataset``: (group, [(speaker, text)]).

    Messages without a word of two letters or with a word of more than 30 letters (keyboard noise,
    links) are left out, a message said twice in a row counts once, runs of a letter end after
    three, and the messages that a speaker sends in a row make one turn, a line each.

    Raises:
        ImportError: the package is not installed.
    """
    return iter(_chitchat_turns())


def clean_message(text: str) -> str:
    """One chat message without noise; empty if it is nothing but noise."""
    text = _RUN.sub(r"\1\1\1", one_space(text))
    words = text.split()
    if not re.search(r"[^\W\d_]{2}", text) or max(map(len, words)) > _LONGEST_WORD:
        return ""
    return text


def chitchat_examples(split: Split) -> Iterator[Example]:
    """Conversation so far -> next turn, for each turn but the first of a conversation.

    Raises:
        ImportError: the package ``chitchat_dataset`` is not installed.
    """
    for group, turns in chitchat_turns():
        if split_of(group) != split:
            continue
        for place in range(1, len(turns)):
            responder = turns[place][0]
            prompt: tuple[Message, ...] = tuple(
                ("assistant" if speaker == responder else "user", text)
                for speaker, text in turns[:place]
            )
            yield Example(prompt, turns[place][1], group, "chitchat")


def chitchat_sentences(split: Split, least_words: int = 4) -> list[str]:
    """Sentences of the conversations of a split, for haystacks; each ends with punctuation.

    Raises:
        ImportError: the package ``chitchat_dataset`` is not installed.
    """
    turns = (turns for group, turns in chitchat_turns() if split_of(group) == split)
    lines = (line for said in turns for _, text in said for line in text.split("\n"))
    sentences = (sentence for line in lines for sentence in split_sentences(line))
    return [_closed(s) for s in sentences if len(s.split()) >= least_words]


def jsonl_examples(path: str | Path, split: Split | None) -> Iterator[Example]:
    """Examples of a JSON-lines file, one object a line; blank lines are skipped.

    Args:
        path: the file.
        split: which groups; ``None`` for all.

    A line has either ``prompt`` and ``response`` (strings; the prompt may be empty) or
    ``messages``, a list of ``{"role": "system" | "user" | "assistant", "content": ...}``; each
    assistant message with something before it is one example. ``group`` is optional and says what
    stays together; without it lines with the same first message do, in whichever file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is no JSON object or a field is missing or wrong; names file and line.
    """
    path = storage.path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no JSON-lines file at {path}")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                found = _examples_of_line(line, f"{path}:{number}", path.name)
                yield from (e for e in found if split is None or split_of(e.group) == split)


def text_sections(path: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Sections of a folder's text files: (group, at most ``SECTION_SENTENCES`` sentences).

    A group is named by file and number: text appended to a file moves no section, text inserted
    early in it moves those behind.

    Args:
        path: a folder, searched with its subfolders for .txt, .md and .rst files.

    Raises:
        FileNotFoundError: no such folder, or no text file in it.
    """
    path = storage.path(path)
    files = [file for file in storage.files_below(path) if file.suffix in _TEXT_SUFFIXES]
    if not files:
        raise FileNotFoundError(f"no {', '.join(_TEXT_SUFFIXES)} file in the folder {path}")
    for file in files:
        sentences = split_sentences(storage.read_text(file, errors="replace"))
        for start in range(0, len(sentences), SECTION_SENTENCES):
            group = f"{file.relative_to(path)}#{start // SECTION_SENTENCES}"
            yield group, sentences[start : start + SECTION_SENTENCES]


def text_examples(
    path: str | Path, split: Split, tokenizer: Tokenizer, budget: int, continuation: bool = False
) -> Iterator[Example]:
    """Whole sentences of a folder's text, packed into rows.

    Args:
        path: a folder of text files.
        split: which sections.
        tokenizer: counts the length.
        budget: ids of a row, the final eos aside.
        continuation: the first half of the sentences is the prompt; otherwise, and for a row of
            one sentence, there is no prompt.

    Raises:
        FileNotFoundError: no such folder, or no text file in it.
    """
    for group, sentences in text_sections(path):
        if split_of(group) != split:
            continue
        for packed in _pack(sentences, tokenizer, budget):
            middle = len(packed) // 2 if continuation else 0
            prompt: tuple[Message, ...] = (("text", " ".join(packed[:middle])),) if middle else ()
            response = (" " if middle else "") + " ".join(packed[middle:])
            yield Example(prompt, response, group, "text")


def text_sentences(path: str | Path, split: Split) -> list[str]:
    """Sentences of a folder's text in one split, for haystacks.

    Raises:
        FileNotFoundError: no such folder, or no text file in it.
    """
    sections = (s for group, s in text_sections(path) if split_of(group) == split)
    return [sentence for section in sections for sentence in section]


def needle_examples(task: NeedleTask, seed: int, count: int) -> Iterator[Example]:
    """The first ``count`` episodes of the stream ``seed``."""
    for index in range(count):
        yield task.episode(seed, index).example(f"needles/{seed}/{index}")


@functools.cache
def _chitchat_turns() -> list[tuple[str, list[tuple[str, str]]]]:
    """``chitchat_turns``, read once."""
    found = []
    for name, conversation in _chitchat_json().items():
        messages = [m for turn in conversation["messages"] for m in turn]
        cleaned = [(m["sender"], clean_message(m["text"])) for m in messages]
        spoken = [key for key, _ in groupby(pair for pair in cleaned if pair[1])]
        turns = groupby(spoken, key=lambda pair: pair[0])
        said = [(who, "\n".join(text for _, text in run)) for who, run in turns]
        found.append((f"chitchat/{name}", said))
    return found


def _chitchat_json() -> dict[str, Any]:
    """The package's data, without running its code."""
    try:
        file = importlib.resources.files("chitchat_dataset") / "dataset.json"
    except ModuleNotFoundError as error:
        raise ImportError(
            "the chitchat corpus is not installed: pip install memdlm_jax[corpus]"
        ) from error
    return json.loads(file.read_text(encoding="utf-8"))


def _closed(sentence: str) -> str:
    """The sentence with a full stop if it ends in a letter or a comma."""
    sentence = sentence.rstrip(" ,;:-")
    return sentence + "." if sentence[-1:].isalnum() else sentence


def _pack(sentences: Iterable[str], tokenizer: Tokenizer, budget: int) -> Iterator[list[str]]:
    """Consecutive sentences of at most ``budget`` ids together; a longer one stands alone."""
    packed: list[str] = []
    used = 0
    for sentence in sentences:
        length = len(tokenizer.encode(" " + sentence))
        if packed and used + length > budget:
            yield packed
            packed, used = [], 0
        packed.append(sentence)
        used += length
    if packed:
        yield packed


def _examples_of_line(line: str, place: str, source: str) -> list[Example]:
    """Examples of one JSON line."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{place}: a line must be a JSON object, not {type(fields).__name__}")
    pairs: list[Pair]
    if "messages" in fields:
        pairs = _conversation(fields["messages"], place)
    else:
        pairs = [(_string(fields, "prompt", place, empty=True), _string(fields, "response", place))]
    prompt, response = pairs[0]
    first = prompt if isinstance(prompt, str) else prompt[0][1]
    if "group" in fields:
        group = _string(fields, "group", place)
    else:
        # Not the file's name: a file that is renamed keeps its splits, and what two files share is
        # in one split.
        group = f"first/{hashlib.sha256((first or response).encode()).hexdigest()[:16]}"
    return [Example(prompt, response, group, source) for prompt, response in pairs]


def _string(fields: dict[str, Any], name: str, place: str, empty: bool = False) -> str:
    """A string field of a JSON object."""
    value = fields.get(name)
    if not isinstance(value, str) or not (value or empty):
        found = "is missing" if name not in fields else f"is {value!r}"
        raise ValueError(f"{place}: field {name!r} {found}, must be a non-empty string")
    return value


def _conversation(messages: Any, place: str) -> list[Pair]:
    """(prompt, response) for each assistant message that answers something."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"{place}: field 'messages' must be a list of objects")
    said: list[Message] = []
    for number, message in enumerate(messages):
        where = f"{place}: messages[{number}]"
        role, content = (_string(message, name, where) for name in ("role", "content"))
        if role not in ("system", "user", "assistant"):
            raise ValueError(
                f"{where}: field 'role' is {role!r}, must be system, user or assistant"
            )
        # There is no turn for a system message: it opens the user's.
        said.append(("assistant" if role == "assistant" else "user", content))
    turns = _merge(said)
    answers = [i for i, (role, _) in enumerate(turns) if i and role == "assistant"]
    pairs: list[Pair] = [(tuple(turns[:i]), turns[i][1]) for i in answers]
    if not pairs:
        raise ValueError(f"{place}: field 'messages' has no assistant message after a user's")
    return pairs


def _merge(messages: list[Message]) -> list[Message]:
    """Consecutive messages of one role as one turn, a line each."""
    runs = ((role, list(run)) for role, run in groupby(messages, key=lambda m: m[0]))
    return [(role, "\n".join(text for _, text in run)) for role, run in runs]

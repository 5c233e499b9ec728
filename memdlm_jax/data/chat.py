"""Chat templates: the Jinja text of a public model renders a conversation as one string.

A template comes from a folder that somebody else wrote, so it runs in Jinja's immutable sandbox:
no private attributes, no changes to what it is given, no files. The dialect is that of Hugging
Face's ``apply_chat_template``. Nothing here knows token ids; ``Tokenizer.chat_ids`` makes them.
"""

import contextvars
import dataclasses
import datetime
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

ChatMessages = Sequence[Mapping[str, str]]
"""Oldest first, each with the keys ``role`` and ``content``."""

LLADA = (
    "{% for message in messages %}{{ bos_token if loop.first else '' }}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt and (not messages or messages[-1]['role'] != 'assistant') %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""LLaDA-8B. Unlike the published template it opens the answer only when asked to."""

LLADA_MOE = (
    "{% set named = messages and messages[0]['role'] == 'system' %}"
    "<role>SYSTEM</role>{{ messages[0]['content'] + '\n' if named else '' }}"
    "detailed thinking off<|role_end|>"
    "{% for message in (messages[1:] if named else messages) %}"
    "<role>{{ 'HUMAN' if message['role'] == 'user' else message['role'] | upper }}</role>"
    "{{ message['content'] }}<|role_end|>{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)
"""LLaDA-MoE, LLaDA2.0 and LLaDA2.1; every conversation opens with a system turn."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Dream, without a default system turn."""

_FAMILIES = (
    (("<|mdm_mask|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), LLADA),
    (("<|mask|>", "<|role_end|>"), LLADA_MOE),
    (("<|mask|>", "<|im_start|>", "<|im_end|>"), CHATML),
)
_MAX_STEPS = 100_000
_MAX_CHARACTERS = 10_000_000
_MAX_EXPONENT = 64
_MAX_INDENT = 16
_WIDTH = re.compile(r"\d{5,}")
_steps: contextvars.ContextVar[Iterator[int]] = contextvars.ContextVar("steps")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template and the names of special tokens that it may print.

    Attributes:
        source: the Jinja text.
        variables: such as ``bos_token``; what the template sees beside the conversation.
    """

    source: str
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        _compiled(self.source)

    def render(self, messages: ChatMessages, add_generation_prompt: bool = True) -> str:
        """``render_chat`` with this template."""
        return render_chat(self.source, messages, add_generation_prompt, self.variables)


def render_chat(
    source: str,
    messages: ChatMessages,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
    now: datetime.datetime | None = None,
) -> str:
    """Text of a conversation, as ``transformers`` renders it.

    Loop steps and calls together are limited to 100,000 and texts to 10 million characters, so
    that a template that loops or grows a text without end stops.

    Args:
        source: the Jinja text.
        messages: the conversation; any roles that the template knows.
        add_generation_prompt: end with what opens the model's turn. A template may ignore it.
        variables: further names for the template, such as ``bos_token``; a missing one is empty.
        now: what ``strftime_now`` formats; ``None`` is the present.

    Raises:
        ValueError: the template is no Jinja, reaches for what the sandbox forbids, runs away, or
            refuses the conversation.
    """
    template = _compiled(source)
    names = dict(variables or {}, messages=[dict(m) for m in messages], tools=None, documents=None)
    names |= {"add_generation_prompt": add_generation_prompt}
    names["strftime_now"] = (now or datetime.datetime.now()).strftime
    token = _steps.set(iter(range(_MAX_STEPS)))
    try:
        return _joined(template.generate(names))
    except Exception as error:  # foreign code: whatever it raises is its own fault
        reason = str(error) or type(error).__name__
        raise ValueError(f"the chat template fails on this conversation: {reason}") from error
    finally:
        _steps.reset(token)


def family_template(has_token: Callable[[str], bool]) -> str:
    """The template of a public family that has published none in its folder.

    Args:
        has_token: whether the vocabulary holds a token of this spelling.

    Returns:
        ``LLADA``, ``LLADA_MOE`` or ``CHATML``: the first whose tokens are all there; empty if none.
    """
    found = (source for needed, source in _FAMILIES if all(map(has_token, needed)))
    return next(found, "")


def hide(texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]) -> tuple[list[str], str]:
    """Replace spans of texts by one character that occurs in none of them.

    Args:
        texts: contents of messages.
        spans: for each text the (start, end) to hide, ascending and disjoint.

    Returns:
        The texts, each span now marked by character and number, ``c0c``, ``c1c``, ... counted over
        all texts, and the regular expression that splits a rendered text at these marks.
    """
    used = set("".join(texts))
    free = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in used)
    hidden, count = [], 0
    for text, places in zip(texts, spans, strict=True):
        parts, last = [], 0
        for start, end in places:
            parts += [text[last:start], f"{free}{count}{free}"]
            last, count = end, count + 1
        hidden.append("".join(parts) + text[last:])
    return hidden, f"{free}([0-9]+){free}"


def split_hidden(rendered: str, pattern: str) -> list[str | int]:
    """A rendered text at its marks: pieces of text and, between them, numbers of hidden spans."""
    parts = re.split(pattern, rendered)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


class _Sandbox(ImmutableSandboxedEnvironment):
    """The immutable sandbox, with every call counted and large products refused."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the template; macros and recursive loops come through here too."""
        _count()
        return _guarded(super().call)(*args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operation of the template."""
        _check_operation(operator, left, right)
        return _bounded(super().call_binop(context, operator, left, right))


def _check_operation(operator: str, left: Any, right: Any) -> None:
    """Refuse what would be large before it is made."""
    if operator == "%" and isinstance(left, str):
        raise jinja2.TemplateRuntimeError("'%' on text is not supported")
    if operator == "**" and (abs(left) > _MAX_CHARACTERS or abs(right) > _MAX_EXPONENT):
        raise jinja2.TemplateRuntimeError("a power is too large")
    if operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, (str, list, tuple)) and len(value) * times > _MAX_CHARACTERS:
                raise jinja2.TemplateRuntimeError("a repeated text is too long")


def _count() -> None:
    """One step of the rendering."""
    if next(_steps.get(), None) is None:
        raise jinja2.TemplateRuntimeError(f"it takes more than {_MAX_STEPS} steps")


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop, one step each."""
    for item in items:
        _count()
        yield item


def _bounded(value: Any) -> Any:
    """The value, unless it is a text or list that grows without end."""
    if isinstance(value, (str, list, tuple)) and len(value) > _MAX_CHARACTERS:
        raise jinja2.TemplateRuntimeError(f"it makes more than {_MAX_CHARACTERS} characters")
    return value


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without numbers, such as widths, that make huge texts, or a huge result."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int) and abs(value) > _MAX_CHARACTERS:
                raise jinja2.TemplateRuntimeError(f"the number {value} is too large")
        _check_text_operation(function, args)
        return _bounded(function(*args, **kwargs))

    return call


def _check_text_operation(function: Callable[..., Any], args: tuple) -> None:
    """Refuse widths in format strings, and texts that ``replace`` or ``join`` would multiply."""
    name, texts = getattr(function, "__name__", ""), [a for a in args if isinstance(a, (str, list))]
    for method in args:  # a call of a text's own method comes with the method
        method = getattr(method, "__wrapped__", method)
        if isinstance(getattr(method, "__self__", None), str):
            name, texts = method.__name__, [method.__self__, *texts]
    if "format" in name and any(_WIDTH.search(text) for text in texts if isinstance(text, str)):
        raise jinja2.TemplateRuntimeError("a width in a format is too large")
    largest = math.prod(sorted(map(len, texts))[-2:])
    if name.removeprefix("do_") in ("replace", "join") and largest > _MAX_CHARACTERS:
        raise jinja2.TemplateRuntimeError("a text is multiplied too often")


def _joined(parts: Iterable[str]) -> str:
    """All parts of a rendering together, stopped when there are too many."""
    found, length = [], 0
    for part in parts:
        length += len(part)
        if length > _MAX_CHARACTERS:
            raise jinja2.TemplateRuntimeError(f"it makes more than {_MAX_CHARACTERS} characters")
        found.append(part)
    return "".join(found)


@functools.cache
def _environment() -> _Sandbox:
    """Jinja with the settings and functions of ``apply_chat_template``."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters = {k: _guarded(f) for k, f in environment.filters.items()}
    environment.filters |= {"tojson": _to_json, "_counted": _counted, "_bounded": _bounded}
    environment.globals["raise_exception"] = _raise
    return environment


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    """The template with a counter in every loop and a bound on every joined text."""
    environment = _environment()
    try:
        tree = environment.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, "_counted")
        for joined in list(tree.find_all(nodes.Concat)):
            joined.nodes = [_filtered(nodes.Concat(joined.nodes, lineno=joined.lineno), "_bounded")]
        return environment.from_string(tree)
    except (jinja2.TemplateError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        place = f" in line {line}" if line else ""
        raise ValueError(f"the chat template is no valid Jinja{place}: {error}") from error


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    """The expression through a filter of ours."""
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    if isinstance(indent := options.get("indent"), int) and indent > _MAX_INDENT:
        raise jinja2.TemplateRuntimeError(f"indent={indent} is too large")
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    """A template's way to refuse a conversation."""
    raise jinja2.TemplateError(message)

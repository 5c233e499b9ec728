"""What the harness's requests ask for, in our terms; nothing here needs the harness."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation.likelihood import up_to

MAX_GEN_TOKS = 256
"""Tokens of an answer where the task does not say, as in the harness's own models."""

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DECODE_FIELDS = frozenset(f.name for f in dataclasses.fields(DecodeConfig)) - {"length"}
"""Sampler settings that a model or a request may have; the length is the task's."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to answer.

    Attributes:
        prompt: token ids.
        config: sampler; ``length`` is whole blocks.
        limit: tokens of the answer at most.
        until: texts that end it.
        repeat: how often the same request came before, so that samples differ.
    """

    prompt: tuple[int, ...]
    config: DecodeConfig
    limit: int
    until: tuple[str, ...]
    repeat: int = 0


def settings_of(
    decode: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[DecodeConfig, int, tuple[str, ...]]:
    """What a request's ``gen_kwargs`` ask for.

    Known are ``until``, ``max_gen_toks`` (and the harness's other names for it), ``do_sample``
    (``False`` is temperature 0 whatever else is said, ``True`` without a temperature is 1),
    ``num_beams`` if it is 1, and the fields of ``DecodeConfig`` but ``length``.

    Args:
        decode: the model's ``DecodeConfig`` fields.
        given: those of the request, which replace them.

    Returns:
        (sampler with whole blocks, tokens of the answer, texts that end it).

    Raises:
        ValueError: a name is unknown or a value wrong; names it.
    """
    fields = dict(given)
    until = fields.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    lengths = [fields.pop(name, None) for name in _LENGTHS]
    limit = next((length for length in lengths if length is not None), MAX_GEN_TOKS)
    if type(limit) is not int or limit < 1:
        raise ValueError(f"gen_kwargs max_gen_toks={limit!r} must be a whole number of 1 or more")
    beams, sampled = fields.pop("num_beams", 1), fields.pop("do_sample", None)
    if beams != 1:
        raise ValueError(f"gen_kwargs num_beams={beams!r} must be 1: there is no beam search")
    for name in fields:
        if name not in DECODE_FIELDS:
            known = ", ".join(sorted({"until", "max_gen_toks", "do_sample", *DECODE_FIELDS}))
            raise ValueError(f"gen_kwargs {name}={fields[name]!r} is unknown; known are {known}")
    if sampled is False:
        fields["temperature"] = 0.0
    elif sampled:
        fields.setdefault("temperature", 1.0)
    config = sampler({**decode, **fields}, limit)
    return config, limit, tuple(text for text in map(str, until) if text)


def sampler(fields: Mapping[str, Any], limit: int) -> DecodeConfig:
    """The sampler with these fields for an answer of ``limit`` tokens, rounded up to whole blocks.

    Raises:
        ValueError: they do not go together, or not with this length; names the field.
    """
    fields = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    block = fields.get("block_length", DecodeConfig.block_length)
    length = up_to(block, limit) if type(block) is int and block > 0 else limit
    try:
        return DecodeConfig(length, **fields)
    except ValueError as error:
        raise ValueError(f"max_gen_toks={limit}: {error}") from error


def before(text: str, ends: Sequence[str]) -> str:
    """What stands before the first of the texts that end one."""
    for end in ends:
        text = text.split(end)[0]
    return text


def windows(tokens: Sequence[int], max_length: int) -> list[tuple[list[int], list[int]]]:
    """Divide a text into contexts and continuations that together score every token once.

    Windows of ``max_length`` tokens stand side by side, each scored as a whole; of the last one,
    which ends with the text, the tokens that the one before has scored are context. The sum of
    their scores bounds the text's log-likelihood under the model that sees no further than its
    window. (The public harness divides texts in the same way; an autoregressive model needs a
    token before the first, and so does that.)

    Args:
        tokens: one or more ids.
        max_length: tokens of a window.
    """
    tokens = list(tokens)
    ends = range(max_length, len(tokens) + max_length, max_length)
    found = []
    for end in ends:
        first, last = end - max_length, min(end, len(tokens))
        found.append((tokens[max(last - max_length, 0) : first], tokens[first:last]))
    return found

"""Files of a tokenizer: ours, or the folder of a public model.

Read are ``tokenizer.json`` or else ``vocab.json`` and ``merges.txt`` of the Qwen2 kind, and beside
them ``tokenizer_config.json``, ``special_tokens_map.json``, ``added_tokens.json`` and
``chat_template.jinja``, all optional. Everything is JSON or text: code that a folder brings
(``auto_map``, classes of its own) is never run and pickles are never opened.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from memdlm_jax import storage
from memdlm_jax.data import chat

_QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "DreamTokenizer")
_QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KEYS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_MORE = "additional_special_tokens"
_KNOWN_SPELLINGS = {
    "mask": ("<|mdm_mask|>", "<|mask|>"),
    "eos": ("<|eos|>", "<|endoftext|>"),
    "pad": ("<|pad|>",),
    "bos": ("<|startoftext|>", "<|beginoftext|>"),
    "user": ("<|user|>",),
    "assistant": ("<|assistant|>",),
}
_TURN_ENDS = ("<|eot_id|>", "<|role_end|>", "<|im_end|>")
OUR_KEY = "memdlm_special_tokens"
"""Key of ``tokenizer_config.json`` under which ``Tokenizer.save`` keeps the tokens it found."""


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Spelling of the special tokens in a tokenizer's vocabulary; empty is to be looked up.

    Attributes:
        pad: fills a row after its end; never attended to.
        mask: the absorbing state of the forward process.
        eos: ends bare text, and a turn where there is no other token for that.
        user: opens a turn of the user; empty where a chat template opens turns.
        assistant: opens a turn of the model; empty likewise.
        bos: opens a text, where the model knows such a token.
        end_of_turn: ends a turn and the response; empty after the look-up is ``eos``.
    """

    pad: str = ""
    mask: str = ""
    eos: str = ""
    user: str = ""
    assistant: str = ""
    bos: str = ""
    end_of_turn: str = ""


OUR_TOKENS = SpecialTokens("<|pad|>", "<|mask|>", "<|eos|>", "<|user|>", "<|assistant|>")
"""A tokenizer trained here gives them the ids 0 to 4 in this order."""


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """What a folder says about its tokenizer.

    Attributes:
        path: the file or folder, for messages.
        backend: vocabulary, merges and added tokens.
        config: content of ``tokenizer_config.json``; empty if there is none.
        special_map: content of ``special_tokens_map.json``; empty if there is none.
        template_file: content of ``chat_template.jinja``; ``None`` if there is none.
    """

    path: Path
    backend: tokenizers.Tokenizer
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    special_map: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    template_file: str | None = None

    def declared(self) -> dict[str, Any]:
        """Tokens that the config, or else the map, names as templates do: ``bos_token``, ..."""
        named = {key: _spelling(self.config.get(key) or self.special_map.get(key)) for key in _KEYS}
        more = self.config.get(_MORE) or self.special_map.get(_MORE) or []
        found = {key: token for key, token in named.items() if token}
        return found | ({_MORE: [_spelling(token) for token in more]} if more else {})


def read(path: str | Path) -> TokenizerFiles:
    """Read a tokenizer file with what lies beside it, or a folder.

    Args:
        path: a folder, or a file in the format of ``tokenizer.json``. Other files are looked for
            beside it only if that is also its name.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: a file is not what its name says, or ids of added tokens disagree.
    """
    path = storage.path(path)
    if path.is_file() and path.name != "tokenizer.json":
        return TokenizerFiles(path, _backend_of_file(path))
    folder = path.parent if path.name == "tokenizer.json" else path
    config = _read_object(folder / "tokenizer_config.json")
    special_map = _read_object(folder / "special_tokens_map.json")
    if (folder / "tokenizer.json").is_file():
        backend = _backend_of_file(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _qwen2_backend(folder, config)
    elif folder.is_dir() and folder == path:
        raise FileNotFoundError(
            f"no tokenizer in {path}; a folder must hold tokenizer.json, or vocab.json and "
            "merges.txt"
        )
    else:
        raise FileNotFoundError(f"no tokenizer at {path}; train one with train_tokenizer")
    jinja = folder / "chat_template.jinja"
    template = jinja.read_text(encoding="utf-8") if jinja.is_file() else None
    files = TokenizerFiles(path, backend, config, special_map, template)
    _add_tokens(backend, _added_tokens(folder, files), folder)
    return files


def find_special(files: TokenizerFiles, given: SpecialTokens, template: str) -> SpecialTokens:
    """Find each special token; the first rule that names one decides.

    1. ``given``; 2. what ``Tokenizer.save`` kept; 3. ``<name>_token`` of ``tokenizer_config.json``;
    4. of ``special_tokens_map.json``; 5. known spellings in the vocabulary. Then ``pad`` is
    ``eos``; ``end_of_turn`` is the first of ``<|eot_id|>``, ``<|role_end|>``, ``<|im_end|>`` that
    the template prints and the vocabulary holds.

    Args:
        files: the tokenizer.
        given: what the caller asks for; empty fields are looked up.
        template: source of the chat template; empty if there is none.

    Raises:
        ValueError: there is no mask or no eos.
    """
    has = has_token(files.backend)
    kept, declared = files.config.get(OUR_KEY), files.declared()
    asked = {key: value for key, value in dataclasses.asdict(given).items() if value}
    if isinstance(kept, dict):
        return SpecialTokens(**{**_known_fields(kept), **asked})
    found = {}
    for name, spellings in _KNOWN_SPELLINGS.items():
        known = (spelling for spelling in spellings if has(spelling))
        found[name] = asked.get(name) or declared.get(f"{name}_token") or next(known, "")
    for name in ("mask", "eos"):
        if not found[name]:
            raise _not_found(files, name)
    printed = (token for token in _TURN_ENDS if token in template and has(token))
    found["end_of_turn"] = given.end_of_turn or next(printed, "")
    return SpecialTokens(**{**found, "pad": found["pad"] or found["eos"]})


def find_template(files: TokenizerFiles, given: str | None, special: SpecialTokens) -> str:
    """Find the chat template; the first rule that names one decides.

    1. ``given``; 2. ``chat_template.jinja``; 3. ``chat_template`` of ``tokenizer_config.json`` (of
    several, the one named ``default``); 4. that of the family whose tokens the vocabulary holds,
    unless the caller says by ``special.user`` how turns open.

    Args:
        files: the tokenizer.
        given: a template, or the empty string for none; ``None`` looks it up.
        special: what the caller asks for.

    Returns:
        The Jinja text; empty if there is none.

    Raises:
        ValueError: the config holds no usable template.
    """
    if given is not None:
        return given
    if files.template_file is not None:
        return files.template_file
    if files.config.get("chat_template") is not None:
        return _default_template(files.config["chat_template"])
    return "" if special.user else chat.family_template(has_token(files.backend))


def has_token(backend: tokenizers.Tokenizer) -> Callable[[str], bool]:
    """Whether the vocabulary holds a token of a given spelling."""
    return lambda token: backend.token_to_id(token) is not None


def config_to_save(special: SpecialTokens, template: chat.ChatTemplate | None) -> dict[str, Any]:
    """``tokenizer_config.json`` from which ``read`` and ``find_special`` restore both."""
    names = dict(template.variables) if template else {}
    return {
        **names,
        "chat_template": template.source if template else "",
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        OUR_KEY: dataclasses.asdict(special),
    }


def _known_fields(kept: Mapping[str, Any]) -> dict[str, str]:
    """Fields of ``SpecialTokens`` in a saved config."""
    names = [field.name for field in dataclasses.fields(SpecialTokens)]
    return {name: str(kept[name]) for name in names if name in kept}


def _not_found(files: TokenizerFiles, name: str) -> ValueError:
    """The error that says where a token was looked for."""
    spellings = ", ".join(_KNOWN_SPELLINGS[name])
    return ValueError(
        f"no {name} token for {files.path}: neither tokenizer_config.json nor "
        f"special_tokens_map.json beside it names a {name}_token, and its vocabulary holds none of "
        f"{spellings}; give the spelling as special=SpecialTokens({name}=...)"
    )


def _backend_of_file(path: Path) -> tokenizers.Tokenizer:
    """A ``tokenizer.json``."""
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from error


def _qwen2_backend(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE of ``vocab.json`` and ``merges.txt``, split and normalised as Qwen2 does."""
    name = config.get("tokenizer_class", _QWEN2_CLASSES[0])
    if name not in _QWEN2_CLASSES:
        raise ValueError(
            f"tokenizer_class={name!r} of {folder} must be one of {', '.join(_QWEN2_CLASSES)}: "
            "vocab.json and merges.txt do not say how text is split; give a tokenizer.json"
        )
    try:
        with (
            storage.on_disk(folder / "vocab.json") as vocabulary,
            storage.on_disk(folder / "merges.txt") as merges,
        ):
            model = models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{folder} has no byte-level BPE in vocab.json: {error}") from error
    backend = tokenizers.Tokenizer(model)
    split = pre_tokenizers.Split(tokenizers.Regex(_QWEN2_PIECES), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _added_tokens(folder: Path, files: TokenizerFiles) -> dict[int, AddedToken]:
    """Added tokens of ``tokenizer_config.json`` and ``added_tokens.json`` by id."""
    declared = files.declared()
    special = {t for v in declared.values() for t in (v if isinstance(v, list) else [v])}
    legacy = _read_object(folder / "added_tokens.json").items()
    try:
        found = {
            int(i): AddedToken(t, special=t in special, normalized=t not in special)
            for t, i in legacy
        }
        listed = files.config.get("added_tokens_decoder", {}).items()
        return found | {int(i): AddedToken(**_token_fields(entry)) for i, entry in listed}
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(
            f"the added tokens of {folder} must be ids with a spelling each: {error}"
        ) from error


def _token_fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``AddedToken`` in an entry of ``added_tokens_decoder``."""
    flags = ("lstrip", "normalized", "rstrip", "single_word", "special")
    return {"content": entry["content"]} | {flag: bool(entry.get(flag)) for flag in flags}


def _add_tokens(
    backend: tokenizers.Tokenizer, wanted: Mapping[int, AddedToken], folder: Path
) -> None:
    """Add the tokens that the backend does not have as they are; each must get its id."""
    present = backend.get_added_tokens_decoder()
    for token_id, token in sorted(wanted.items()):
        old = present.get(token_id)
        if old is None or (old.content, old.special) != (token.content, token.special):
            backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != token_id:
            raise ValueError(
                f"added token {token.content!r} of {folder} must have id {token_id}, but the "
                f"vocabulary gives it {found}"
            )


def _default_template(found: Any) -> str:
    """The template named ``default`` among several, given as a list or an object."""
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict)]
        found = {entry.get("name"): entry.get("template") for entry in named}
    text = found.get("default") if isinstance(found, dict) else found
    if not isinstance(text, str):
        names = sorted(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(
            "chat_template in tokenizer_config.json must be a text, or several of which one is "
            f"named 'default', not {names}; give one as chat_template=..."
        )
    return text


def _spelling(token: Any) -> str:
    """A token that is given as text or as an object with ``content``; empty if it is neither."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content

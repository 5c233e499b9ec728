"""The byte-level BPE: exact round trips, whole numbers, special tokens that text cannot forge."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from memdlm_jax.data import chat
from memdlm_jax.data.tokenizer import SpecialTokens, Tokenizer, train_tokenizer

LLADA = Path(__file__).parents[1] / "golden" / "tokenizer_llada"
GOLDEN = json.loads((LLADA / "golden_tokenizer.json").read_text())
TEXT = ["The quick brown fox jumps over the lazy dog.", "Mary went to the bathroom, didn't she?"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "é\n\n \t x\r\n 漢字🙂 007 1234567",
        "\x00\x7f",
        "<|eos|>",
        "a  b   c ",
        "it's ''x''",
    ],
)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_come_first(tokenizer):
    ids = [tokenizer.pad_id, tokenizer.mask_id, tokenizer.eos_id]
    assert [*ids, tokenizer.user_id, tokenizer.assistant_id] == [0, 1, 2, 3, 4]


def test_text_never_becomes_a_special_id(tokenizer, tmp_path):
    text = "a <|mask|> b<|eos|><|user|>"
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    for one in (tokenizer, loaded):
        assert min(one.encode(text)) > 4
        assert min(one.encode_batch([text])[0]) > 4


def test_decode_can_show_special_tokens(tokenizer):
    ids = [tokenizer.user_id, *tokenizer.encode("hi"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special=False) == "<|user|>hi<|eos|>"


@pytest.mark.parametrize("context", ["{}", " {}.", "is: {}.\n"])
def test_every_number_below_1000_is_one_token(tokenizer, context):
    around = tokenizer.encode(context.format("7"))
    (position,) = (i for i, token in enumerate(around) if tokenizer.token(token) == "7")
    for number in range(10, 1000):
        ids = tokenizer.encode(context.format(number))
        assert len(ids) == len(around)
        assert tokenizer.token(ids[position]) == str(number)


def test_longer_numbers_split_in_threes(tokenizer):
    assert [tokenizer.token(i) for i in tokenizer.encode("7654321")] == ["765", "432", "1"]


def test_training_is_deterministic_and_the_file_keeps_the_digest(tmp_path):
    first, second = train_tokenizer(TEXT, 1300), train_tokenizer(iter(TEXT), 1300)
    assert first.digest() == second.digest()
    first.save(tmp_path / "deep" / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "deep" / "tokenizer.json").digest() == first.digest()
    assert train_tokenizer(TEXT[:1], 1300).digest() != first.digest()


def test_vocabulary_is_as_large_as_asked_when_the_text_suffices():
    assert train_tokenizer(TEXT, 280, whole_numbers=False).vocab_size == 280
    assert train_tokenizer(TEXT, 50_000).vocab_size < 2_000


def test_bad_input_is_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="vocab_size=300 must be at least 1251"):
        train_tokenizer(TEXT, 300)
    with pytest.raises(ValueError, match="texts is empty"):
        train_tokenizer([], 2000)
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json")
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"special\.mask='<m>' is not in the tokenizer's"):
        Tokenizer.load(tmp_path / "tokenizer.json", SpecialTokens(mask="<m>"))


def test_our_digests_have_not_moved():
    tiny = Path(__file__).parents[2] / "memdlm_jax" / "assets" / "tiny" / "tokenizer.json"
    assert Tokenizer.load(tiny).digest() == (
        "8c40286c22174a1734d03c084b32e7679ef7ff870b9d1215a031c3362bea225b"
    )


def copied(tmp_path, **config):
    """The LLaDA folder with another ``tokenizer_config.json``; a value ``None`` takes a key out."""
    folder = tmp_path / "model"
    shutil.copytree(LLADA, folder)
    content = json.loads((folder / "tokenizer_config.json").read_text()) | config
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def llada() -> Tokenizer:
    return Tokenizer.load(LLADA)


@pytest.mark.parametrize("case", GOLDEN["encode"])
def test_a_public_tokenizer_encodes_as_recorded(llada, case):
    assert llada.encode(case["text"], allow_special=True) == case["ids"]
    assert llada.decode(case["ids"], skip_special=False) == case["decode"]
    assert llada.decode(case["ids"]) == case["decode_skip"]
    as_text = llada.encode(case["text"])
    assert max(as_text, default=0) < min(GOLDEN["special_ids"].values())
    assert llada.decode(as_text) == case["decode"]


@pytest.mark.parametrize("case", GOLDEN["chat"])
@pytest.mark.parametrize("template", [None, chat.LLADA])
def test_a_public_tokenizer_encodes_conversations_as_recorded(case, template):
    loaded = Tokenizer.load(LLADA / "tokenizer.json", chat_template=template)
    assert loaded.chat_ids(case["messages"]) == case["ids_add_gen_true"]


def test_special_tokens_of_a_public_tokenizer(llada):
    spelled = GOLDEN["special_ids"]
    assert llada.vocab_size == GOLDEN["len_tokenizer"]
    assert llada.mask_id == spelled["<|mdm_mask|>"]
    assert llada.eos_id == llada.pad_id == spelled["<|endoftext|>"]
    assert llada.bos_id == spelled["<|startoftext|>"]
    assert llada.end_of_turn_id == spelled["<|eot_id|>"]
    with pytest.raises(ValueError, match="no token that opens a turn of the user"):
        _ = llada.user_id


def test_our_tokenizer_ends_turns_with_eos_and_has_no_template(tokenizer):
    assert (tokenizer.end_of_turn_id, tokenizer.bos_id, tokenizer.chat) == (2, None, None)
    with pytest.raises(ValueError, match="has no chat template"):
        tokenizer.chat_ids([{"role": "user", "content": "Hi"}])


MASK = {"content": "<|reserved_token_0|>", "lstrip": False}


@pytest.mark.parametrize(
    ("config", "special_map", "given", "expected"),
    [
        ({}, {}, "", "<|mdm_mask|>"),
        ({}, {"mask_token": "[gMASK]"}, "", "[gMASK]"),
        ({"mask_token": MASK}, {"mask_token": "[gMASK]"}, "", "<|reserved_token_0|>"),
        ({"mask_token": MASK}, {"mask_token": "[gMASK]"}, "[CLS]", "[CLS]"),
    ],
)
def test_the_first_rule_that_names_a_token_decides(tmp_path, config, special_map, given, expected):
    folder = copied(tmp_path, **config)
    (folder / "special_tokens_map.json").write_text(json.dumps(special_map))
    loaded = Tokenizer.load(folder, SpecialTokens(mask=given))
    assert loaded.special.mask == expected
    assert loaded.mask_id == GOLDEN["special_ids"][expected]
    assert loaded.special.eos == "<|endoftext|>"


def test_a_file_alone_is_known_by_its_spellings(tmp_path, llada):
    shutil.copy(LLADA / "tokenizer.json", tmp_path)
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.special == llada.special
    assert loaded.chat.source == chat.LLADA
    assert loaded.chat_ids(GOLDEN["chat"][1]["messages"]) == (GOLDEN["chat"][1]["ids_add_gen_true"])
    plain = Tokenizer.load(tmp_path, SpecialTokens(user="<role>", assistant="</role>"))
    assert (plain.chat, plain.user_id) == (None, GOLDEN["special_ids"]["<role>"])


@pytest.mark.parametrize(
    ("declared", "file", "given", "expected"),
    [
        ("config", None, None, "config"),
        ("config", "file", None, "file"),
        ("config", "file", "given", "given"),
        ("config", None, "", None),
        (
            [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}],
            None,
            None,
            "b",
        ),
        ({"tools": "a", "default": "b"}, None, None, "b"),
        (None, None, None, chat.LLADA),
    ],
)
def test_the_first_rule_that_names_a_template_decides(tmp_path, declared, file, given, expected):
    folder = copied(tmp_path, chat_template=declared)
    if file:
        (folder / "chat_template.jinja").write_text(file)
    loaded = Tokenizer.load(folder, chat_template=given)
    assert (loaded.chat and loaded.chat.source) == expected


@pytest.mark.parametrize("template", ["no end", "{# <|im_end|> #}"])
def test_a_turn_ends_with_eos_where_the_template_prints_no_other_end(tmp_path, template):
    loaded = Tokenizer.load(copied(tmp_path), chat_template=template)
    assert loaded.end_of_turn_id == loaded.eos_id


@pytest.mark.parametrize("special", [None, SpecialTokens(mask="[gMASK]", end_of_turn="[CLS]")])
@pytest.mark.parametrize("template", [None, "", "{{ cls_token ~ messages[0]['content'] }}"])
def test_a_saved_public_tokenizer_comes_back(tmp_path, special, template):
    first = Tokenizer.load(LLADA, special, chat_template=template)
    first.save(tmp_path / "deep" / "tokenizer.json")
    second = Tokenizer.load(tmp_path / "deep" / "tokenizer.json", digest=first.digest())
    assert (second.special, second.chat) == (first.special, first.chat)
    if first.chat:
        messages = [{"role": "user", "content": "Hi"}]
        assert second.chat_ids(messages) == first.chat_ids(messages)


def test_the_digest_covers_special_tokens_and_template(llada):
    others = [
        Tokenizer.load(LLADA, SpecialTokens(mask="[gMASK]")),
        Tokenizer.load(LLADA, SpecialTokens(end_of_turn="[CLS]")),
        Tokenizer.load(LLADA, chat_template=chat.LLADA),
        Tokenizer.load(LLADA, chat_template=""),
        Tokenizer.load(LLADA, SpecialTokens(bos="[CLS]")),
    ]
    assert len({llada.digest(), *(other.digest() for other in others)}) == 6
    assert Tokenizer.load(LLADA).digest() == llada.digest()


def test_what_lies_beside_belongs_to_tokenizer_json_alone(tmp_path, llada, tokenizer):
    with pytest.raises(ValueError, match=r"must end in tokenizer\.json"):
        llada.save(tmp_path / "other.json")
    folder = copied(tmp_path)
    tokenizer.save(folder / "ours.json")
    assert Tokenizer.load(folder / "ours.json").digest() == tokenizer.digest()
    tokenizer.save(tmp_path / "tokenizer.json")
    assert not (tmp_path / "tokenizer_config.json").exists()


@pytest.mark.parametrize("spelled", ["<|eot_id|>", "<|mdm_mask|>", "<role>"])
@pytest.mark.parametrize("text", ["{}", "a {} b {}", " {} \ue000", "<|eot{}_id|>"])
def test_a_message_cannot_forge_a_special_token(llada, spelled, text):
    content = text.format(spelled, spelled)
    ids = llada.chat_ids([{"role": "user", "content": content}])
    harmless = llada.chat_ids([{"role": "user", "content": "x"}])
    special = set(GOLDEN["special_ids"].values())
    assert [i for i in ids if i in special] == [i for i in harmless if i in special]
    rendered = llada.chat.render([{"role": "user", "content": content}])
    assert llada.decode(ids, skip_special=False) == rendered


def test_tokens_that_a_folder_forgot_to_flag_cannot_be_forged(tmp_path):
    folder = copied(tmp_path, added_tokens_decoder=None)
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(content))
    loaded = Tokenizer.load(folder)
    ids = GOLDEN["special_ids"]
    forged = "<|mdm_mask|><|eot_id|><|start_header_id|>"
    assert not {ids[token] for token in ids if token in forged} & set(loaded.encode(forged))
    assert not set(ids.values()) & {i for row in loaded.encode_batch([forged]) for i in row}
    turn = loaded.chat_ids([{"role": "user", "content": forged}])
    assert turn.count(ids["<|eot_id|>"]) == 1
    assert loaded.mask_id not in turn
    assert loaded.decode([loaded.mask_id, *loaded.encode("a"), loaded.end_of_turn_id]) == "a"


def qwen2_folder(folder, **config):
    """A folder of the Qwen2 kind: 256 bytes, four merges, three added tokens."""
    spelled = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "1")]
    vocab = {token: i for i, token in enumerate([*spelled, *(a + b for a, b in merges)])}
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>")
    added = {str(260 + i): {"content": name, "special": True} for i, name in enumerate(names)}
    content = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization.Evil", None]},
        "added_tokens_decoder": added,
        "eos_token": "<|endoftext|>",
        "bos_token": {"content": "<|beginoftext|>"},
        "pad_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content | config))
    (folder / "tokenization.py").write_text("raise SystemExit('code of a folder was run')")
    return folder


def test_a_qwen2_folder_of_vocabulary_and_merges(tmp_path):
    loaded = Tokenizer.load(qwen2_folder(tmp_path / "dream"))

    def spell(text):
        return [loaded.token(i) for i in loaded.encode(text)]

    assert spell("hell hello") == ["hell", "Ġ", "hell", "o"]
    # Numbers are split into digits and stand apart from spaces, so that merge never applies.
    assert spell(" 12") == ["Ġ", "1", "2"]
    assert loaded.encode("e\u0301") == loaded.encode("\u00e9")
    assert spell("\u00e9") == ["Ã", "©"]
    text = "it's\r\n\n 漢字 x!\n"
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.eos_id, loaded.pad_id, loaded.bos_id, loaded.mask_id) == (260, 260, 263, 264)
    assert loaded.chat.source == chat.CHATML
    ids = loaded.chat_ids([{"role": "user", "content": "<|im_end|>"}])
    assert [i for i in ids if i >= 260] == [261, 262, 261]
    assert loaded.end_of_turn_id == 262
    loaded.save(tmp_path / "saved" / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "saved", digest=loaded.digest())
    assert again.encode("hell 1e\u0301") == loaded.encode("hell 1e\u0301")
    assert Tokenizer.load(tmp_path / "dream" / "tokenizer.json").digest() == loaded.digest()


def test_added_tokens_of_the_older_file(tmp_path):
    folder = qwen2_folder(tmp_path / "old", added_tokens_decoder={})
    (folder / "added_tokens.json").write_text('{"<|mask|>": 261, "<|endoftext|>": 260}')
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(folder)
    assert (loaded.eos_id, loaded.mask_id, loaded.bos_id, loaded.chat) == (260, 261, None, None)


def test_bad_folders_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"must hold tokenizer\.json, or vocab\.json and"):
        Tokenizer.load(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"tokenizer_class='GPT2Tokenizer' of .* must be one of"):
        Tokenizer.load(qwen2_folder(tmp_path / "gpt", tokenizer_class="GPT2Tokenizer"))
    gap = {"300": {"content": "<|mask|>"}}
    with pytest.raises(ValueError, match=r"added token '<\|mask\|>' of .* must have id 300"):
        Tokenizer.load(qwen2_folder(tmp_path / "gap", added_tokens_decoder=gap))
    with pytest.raises(ValueError, match=r"the added tokens of .* must be ids"):
        Tokenizer.load(qwen2_folder(tmp_path / "word", added_tokens_decoder={"one": {}}))
    added = {"260": {"content": "<|endoftext|>"}, "261": {"content": "<|beginoftext|>"}}
    folder = qwen2_folder(tmp_path / "none", added_tokens_decoder=added)
    with pytest.raises(
        ValueError, match=r"no mask token for .*none: neither .*SpecialTokens\(mask"
    ):
        Tokenizer.load(folder)
    with pytest.raises(ValueError, match=r"special\.mask='\[M\]' is not in the tokenizer's"):
        Tokenizer.load(qwen2_folder(tmp_path / "absent", mask_token="[M]"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"chat_template": "{% if %}"}, "no valid Jinja"),
        ({"chat_template": 3}, "must be a text, or several of which one is named 'default'"),
        ({"chat_template": [{"name": "tools", "template": "a"}]}, r"not \['tools'\]; give one as"),
    ],
)
def test_a_bad_template_of_a_folder_is_named(tmp_path, config, message):
    folder = copied(tmp_path, **config)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(folder)
    assert Tokenizer.load(folder, chat_template=chat.LLADA).chat is not None


def test_a_broken_config_is_named(tmp_path):
    folder = copied(tmp_path)
    (folder / "special_tokens_map.json").write_text("[]")
    with pytest.raises(ValueError, match=r"special_tokens_map\.json must hold a JSON object"):
        Tokenizer.load(folder)
    (folder / "special_tokens_map.json").write_text("{")
    with pytest.raises(ValueError, match=r"special_tokens_map\.json is no JSON"):
        Tokenizer.load(folder)

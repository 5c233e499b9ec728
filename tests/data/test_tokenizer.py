"""The byte-level BPE: exact round trips, whole numbers, special tokens that text cannot forge."""

import pytest

from memdlm_jax.data.tokenizer import SpecialTokens, Tokenizer, train_tokenizer

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

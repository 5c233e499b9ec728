"""Episodes: what texts and questions are, how they are packed, and what bad ones are told."""

import itertools
import json

import numpy as np
import pytest

from memdlm_jax.data.episodes import (
    Episode,
    EpisodeBatches,
    EpisodeConfig,
    ListedEpisodes,
    NeedleEpisodes,
    encode_text,
    jsonl_episodes,
    pack,
    pieces_of,
)
from memdlm_jax.data.example import Example

ASKED = Example("Where is the key?", "under the mat", "home", "test")
HOME = Episode(
    ("The key is under the mat.", "The door is green."), (ASKED,), ("under the mat",), "home"
)


def needles(tokenizer, **changes):
    given = {"keys": 3, "tokens": 0, "questions": 2, "split": "train", "tokenizer": tokenizer}
    return NeedleEpisodes(**(given | changes))


def spelled(tokenizer, batch, row):
    return tokenizer.decode(batch.tokens[row][batch.valid[row]], skip_special=False)


class TestPacking:
    def test_pieces_stay_whole_and_in_order(self):
        pieces = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]]
        assert pack(pieces, 5) == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
        assert pack(pieces, 4) == [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]]

    def test_a_piece_longer_than_a_segment_is_cut(self):
        assert pack([[1], list(range(2, 10)), [10]], 3) == [[1], [2, 3, 4], [5, 6, 7], [8, 9, 10]]

    def test_nothing_is_lost(self):
        rng = np.random.default_rng(0)
        pieces = [rng.integers(9, size=n).tolist() for n in rng.integers(0, 12, 50)]
        segments = pack(pieces, 7)
        assert [*itertools.chain(*segments)] == [*itertools.chain(*pieces)]
        assert all(0 < len(segment) <= 7 for segment in segments)

    def test_sentences_and_lines_are_pieces(self):
        assert pieces_of("One is here. Two is there.\nThree\n\n") == (
            "One is here.", "Two is there.", "Three",
        )  # fmt: skip

    def test_a_text_is_one_row_of_segments(self, tokenizer):
        text = "For is a word. While is a word. If is a word."
        found = encode_text(tokenizer, text, 16)
        assert found.tokens.shape == (1, found.tokens.shape[1], 16)
        again = "".join(
            tokenizer.decode(ids[ok])
            for ids, ok in zip(*map(np.squeeze, (found.tokens, found.valid)), strict=True)
        )
        assert again.strip() == text
        with pytest.raises(ValueError, match="the text is empty"):
            encode_text(tokenizer, " \n", 16)


class TestNeedles:
    def test_every_question_has_its_answer_in_the_text(self, tokenizer):
        episode = needles(tokenizer).episode(0, 5)
        assert len(episode.pieces) == 3 and len(episode.questions) == 2
        for question in episode.questions:
            (place,) = [p for p in episode.pieces if p.endswith(f" {question.response}.")]
            key = place.removeprefix("One of the special magic numbers for ").split(" is:")[0]
            assert f" {key}" in question.prompt + question.prefix
        assert episode == needles(tokenizer).episode(0, 5) != needles(tokenizer).episode(0, 6)

    def test_sentences_fill_the_text(self, tokenizer, sentences):
        episode = needles(tokenizer, tokens=300, sentences=tuple(sentences)).episode(0, 0)
        total = sum(len(tokenizer.encode(f" {piece}")) for piece in episode.pieces)
        longest = max(len(tokenizer.encode(f" {piece}")) for piece in sentences)
        assert 300 - longest < total <= 300
        assert {*episode.pieces} - {*sentences} != {*episode.pieces}

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"questions": 4}, "questions=4 must be from 1 to keys=3"),
            ({"tokens": 50}, "tokens=50 needs sentences"),
            ({"split": "all"}, "split='all' must be one of"),
        ],
    )
    def test_bad_settings(self, tokenizer, changes, said):
        with pytest.raises(ValueError, match=said):
            needles(tokenizer, **changes)


class TestBatches:
    def batches(self, tokenizer, episodes=None, **changes):
        config = {"texts": 2, "questions": 2, "segment": 64, "segments": 2, "length": 40}
        config = EpisodeConfig(**(config | changes))
        return EpisodeBatches(episodes or needles(tokenizer), tokenizer, config)

    def test_rows_are_the_questions_of_their_texts(self, tokenizer):
        batches = self.batches(tokenizer)
        batch = batches.batch_at(3)
        episodes = [batches.episodes.episode(0, 6 + i) for i in range(2)]
        questions = [q for e in episodes for q in e.questions]
        assert batch.tokens.shape == (4, 40) and batch.context.tokens.shape == (2, 2, 64)
        for row, question in enumerate(questions):
            text = spelled(tokenizer, batch, row)
            asked = f"<|user|>{question.prompt}<|eos|><|assistant|>"
            assert text == f"{question.prefix or asked}{question.response}<|eos|>"
            answer = tokenizer.decode(batch.tokens[row][batch.maskable[row]])
            assert answer == question.response
        for place, episode in enumerate(episodes):
            tokens, valid = batch.context.tokens[place], batch.context.valid[place]
            text = "".join(tokenizer.decode(ids[ok]) for ids, ok in zip(tokens, valid, strict=True))
            assert text == "".join(f" {piece}" for piece in episode.pieces)
        again = batches.batch_at(3)
        np.testing.assert_array_equal(batch.context.tokens, again.context.tokens)

    def test_weights_move_from_answers_to_all_tokens(self, tokenizer):
        batches = self.batches(tokenizer, focus=8.0, hold=10, ramp=20)
        for step, answers, others in (
            (0, 8, 0),
            (10, 8, 0),
            (20, 4.5, 0.5),
            (30, 1, 1),
            (99, 1, 1),
        ):
            assert batches.config.weights(step) == (answers, others)
        context = batches.batch_at(0).context
        for place in range(2):
            episode = batches.episodes.episode(0, place)
            found = tokenizer.decode(context.tokens[place][context.weight[place] == 8])
            assert found.split() == list("".join(episode.answers)) or found.replace(
                " ", ""
            ) == "".join(episode.answers)
        assert batches.batch_at(99).context.weight is None

    def test_what_does_not_fit_is_an_error(self, tokenizer):
        with pytest.raises(ValueError, match=r"'home' takes 4 segments of 8 .* segments=1 must"):
            self.batches(
                tokenizer, ListedEpisodes((HOME,)), questions=1, segment=8, segments=1
            ).batch_at(0)
        with pytest.raises(ValueError, match=r"question of episode 'home' .* length=8 tokens"):
            self.batches(tokenizer, ListedEpisodes((HOME,)), questions=1, length=8).batch_at(0)
        with pytest.raises(ValueError, match="'home' has 1 questions, fewer than questions=2"):
            self.batches(tokenizer, ListedEpisodes((HOME,))).batch_at(0)

    def test_listed_episodes_come_once_a_round(self):
        many = tuple(Episode((f"Fact {i}.",), (ASKED,), group=str(i)) for i in range(5))
        listed = ListedEpisodes(many)
        rounds = [[listed.episode(3, 5 * r + i).group for i in range(5)] for r in range(3)]
        assert all(sorted(groups) == list("01234") for groups in rounds)
        assert rounds[0] != rounds[1]


class TestJsonl:
    def write(self, folder, *lines):
        file = folder / "own.jsonl"
        file.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
        return file

    def test_strings_messages_and_several_questions(self, tmp_path):
        file = self.write(
            tmp_path,
            {"context": "The sky is red. It rains.", "prompt": "Sky?", "response": "red"},
            {
                "context": [
                    {"role": "user", "content": "I am Ann."},
                    {"role": "assistant", "content": "Hi!"},
                ],
                "questions": [
                    {"prompt": "Who am I?", "response": "Ann"},
                    {"prompt": "Greet me.", "response": "Hello"},
                ],
                "group": "ann",
            },
        )  # fmt: skip
        first, second = jsonl_episodes(file)
        assert first.pieces == ("The sky is red.", "It rains.") and first.answers == ("red",)
        assert second.pieces == ("User: I am Ann.", "Assistant: Hi!")
        assert second.group == "ann" and second.answers == ("Ann",)
        assert [q.response for q in second.questions] == [" Ann", "Hello"]

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ({"prompt": "a", "response": "b"}, "field 'context' is None"),
            ({"context": "  ", "prompt": "a", "response": "b"}, "field 'context' is '  '"),
            ({"context": [{"role": "user"}], "prompt": "a", "response": "b"}, r"context\[0\] must"),
            ({"context": "x", "prompt": "a"}, "field 'response' is None"),
            ({"context": "x", "prompt": " ", "response": "b"}, "field 'prompt' is ' '"),
            ({"context": "x", "questions": []}, "has no question"),
            ({"context": "x", "questions": ["a"]}, "'questions' must be a list of objects"),
            ({"context": "x", "prompt": "a", "response": "b", "group": 3}, "field 'group' is 3"),
            (["x"], "must be a JSON object, not list"),
            (
                {"context": "x", "prompt": "a", "response": "b", "answer_in_context": True},
                "response 'b' must be in the context",
            ),
        ],
    )
    def test_bad_lines_are_named(self, tmp_path, line, said):
        good = {"context": "x y", "prompt": "a", "response": "b"}
        file = self.write(tmp_path, good, line)
        with pytest.raises(ValueError, match=rf"own\.jsonl:2: .*{said}"):
            jsonl_episodes(file)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no JSON-lines file"):
            jsonl_episodes(tmp_path / "none.jsonl")

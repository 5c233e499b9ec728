"""RULER prompts to the character, and what the definitions say about their contents."""

import collections
import math
import re

import pytest

from memdlm_jax.evaluation.ruler import RulerConfig, RulerTask, TokenCounter
from memdlm_jax.evaluation.ruler.tracking import Tracking

GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
UUID = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


def characters(text):
    """A tokenizer of characters; it gives no list, only something with a length."""
    return text


@pytest.fixture(scope="module")
def counter():
    return TokenCounter(characters)


@pytest.fixture(scope="module")
def make(counter, sentences):
    def prompts(task, length=4000, count=20, **settings):
        ruler = RulerTask(RulerConfig(task, length, **settings), counter, sentences=sentences)
        return [ruler.sample(index) for index in range(count)]

    return prompts


def read(pattern, sample):
    match = re.fullmatch(pattern, sample.prompt, re.DOTALL)
    assert match, sample.prompt
    return match


def one(kind):
    return (
        rf"A special magic {kind} is hidden within the following text\. Make sure to memorize it\. "
        rf"I will quiz you about the {kind} afterwards\.\n(?P<context>.*)\n"
        rf"What is the special magic {kind} for (?P<query>.+) mentioned in the provided text\? "
        rf"(?P<prefix>The special magic {kind} for (?P=query) mentioned in the provided text is)"
    )


MANY = (
    r"Some special magic numbers are hidden within the following text\. Make sure to memorize it\. "
    r"I will quiz you about the numbers afterwards\.\n(?P<context>.*)\n"
    r"What are all the special magic numbers for (?P<query>.+) mentioned in the provided text\? "
    r"(?P<prefix>The special magic numbers for (?P=query) mentioned in the provided text are)"
)
TRACK = (
    r"Memorize and track the chain\(s\) of variable assignment hidden in the following text\.\n\n"
    r"(?P<context>.*)\nQuestion: Find all variables that are assigned the value (?P<value>\d{5}) "
    r"in the text above\. (?P<prefix>Answer: According to the chain\(s\) of variable assignment in "
    r"the text above, (?P<count>\d+) variables are assgined the value (?P=value), they are:)"
)
COMMON = (
    r"Below is a numbered list of words\. In these words, some appear more often than others\. "
    r"Memorize the ones that appear most often\.\n(?P<context>[^\n]*)\n"
    r"Question: What are the (?P<count>\d+) most common words in the above list\?\n\n"
    r"(?P<prefix>Answer: The top (?P=count) words that appear most often in the list are:)"
)
FREQUENT = (
    r"Read the following coded text and track the frequency of each coded word\. Find the three "
    r"most frequently appeared coded words\. (?P<context>[a-z. ]*)\nQuestion: Do not provide any "
    r"explanation\. Please ignore the dots '\.\.\.\.'\. What are the three most frequently "
    r"appeared words in the above coded text\? (?P<prefix>Answer: According to the coded text "
    r"above, the three most frequently appeared words are:)"
)


@pytest.mark.parametrize(
    ("task", "kind", "key", "value", "separator"),
    [
        ("niah_single_1", "number", r"[^:]+?-[^:]+", r"[1-9]\d{6}", "\n"),
        ("niah_single_2", "number", r"[^:]+?-[^:]+", r"[1-9]\d{6}", " "),
        ("niah_single_3", "uuid", r"[^:]+?-[^:]+", UUID, " "),
        ("niah_multikey_1", "number", r"[^:]+?-[^:]+", r"[1-9]\d{6}", " "),
        ("niah_multikey_2", "number", r"[^:]+?-[^:]+", r"[1-9]\d{6}", "\n"),
        ("niah_multikey_3", "uuid", UUID, UUID, "\n"),
    ],
)
def test_one_needle_is_asked_for(task, kind, key, value, separator, make, sentences):
    needle = rf"One of the special magic {kind}s for ({key}) is: ({value})\."
    for sample in make(task):
        match = read(one(kind), sample)
        assert match["prefix"] == sample.prefix
        found = re.findall(needle, match["context"])
        assert [v for k, v in found if k == match["query"]] == list(sample.references)
        assert len({k for k, _ in found}) == len({v for _, v in found}) == len(found)
        if task in ("niah_multikey_2", "niah_multikey_3"):
            *whole, last = [line for line in match["context"].split("\n")]
            cut = [line for line in [*whole, last] if not re.fullmatch(needle, line)]
            assert len(found) > 20 and len(cut) <= 1
            continue
        assert len(found) == (4 if task == "niah_multikey_1" else 1)
        hay = re.sub(rf"{needle}{separator}?", "", match["context"]).rstrip(separator)
        unit = {GRASS} if task == "niah_single_1" else set(sentences)
        pieces = hay.split("\n") if separator == "\n" else re.split(r"(?<=\.) ", hay)
        assert set(pieces[:-1]) <= unit and len(pieces) > 20
        assert any(text.startswith(pieces[-1]) for text in unit)


def test_the_asked_value_is_the_only_one_of_its_kind(make):
    for sample in make("niah_multikey_2", value_digits=1, count=5):
        values = re.findall(r"is: (\d)\.", sample.prompt)
        assert values.count(sample.references[0]) == 1 and len(values) > 30
        assert len(set(values)) > 5


def test_text_starts_anywhere_and_goes_round(make, sentences):
    starts = {
        re.split(r"(?<=\.) ", read(one("number"), sample)["context"])[0]
        for sample in make("niah_single_2", depth=100)
    }
    assert starts <= set(sentences) and len(starts) > 5
    # 4,000 characters are more than the 40 sentences have.
    for sample in make("niah_single_2", depth=100, count=3):
        found = re.split(r"(?<=\.) ", read(one("number"), sample)["context"])[:41]
        assert any(found == [sentences[(p + i) % 40] for i in range(41)] for p in range(40))


@pytest.mark.parametrize(("task", "keys"), [("niah_multivalue", 1), ("niah_multiquery", 4)])
def test_four_values_are_asked_for(task, keys, make):
    for sample in make(task):
        match = read(MANY, sample)
        assert match["prefix"] == sample.prefix
        found = re.findall(
            r"One of the special magic numbers for ([^:]+) is: ([1-9]\d{6})\.", match["context"]
        )
        asked = re.split(r", and |, ", match["query"])
        assert len(asked) == keys and match["query"].count(", and ") == (keys > 1)
        assert {key for key, _ in found} == set(asked)
        assert {value for _, value in found} == set(sample.references)
        assert len(found) == len(sample.references) == 4
        assert sample.response == " " + ", ".join(sample.references)
    assert len({sample.prefix for sample in make(task)}) == 20


def test_needle_settings(make):
    for sample in make("niah_multikey_1", num_keys=2, value_digits=3):
        found = re.findall(r"numbers for [^:]+ is: (\d+)\.", read(one("number"), sample)["context"])
        assert len(found) == 2 and all(re.fullmatch(r"[1-9]\d\d", value) for value in found)
    for sample in make("niah_multivalue", num_values=2):
        assert len(sample.references) == read(MANY, sample)["context"].count(" is: ") == 2
    for sample in make("niah_multivalue", num_values=1):
        assert len(sample.references) == read(one("number"), sample)["context"].count(" is: ") == 1
    for sample in make("niah_multiquery", num_keys=2):
        assert read(MANY, sample)["query"].count(", and ") == 1


def test_a_prompt_of_noise_in_full(counter):
    ruler = RulerTask(RulerConfig("niah_single_1", 800, depth=0), counter)
    sample = ruler.sample(0)
    (value,) = sample.references
    key = re.findall(r"for (\S+) is:", sample.prompt)[0]
    lines = sample.prompt.split("\n")
    cut = lines[-2]
    assert GRASS.startswith(cut)
    assert sample.prompt == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
        f"One of the special magic numbers for {key} is: {value}.\n"
        + f"{GRASS}\n"
        * (len(lines) - 4)
        + f"{cut}\nWhat is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )


def chain(context):
    """(value, names) of the one chain of a context, in its order."""
    first = re.findall(r"VAR ([A-Z]+) = (\d{5})", context)
    hops = re.findall(r"VAR ([A-Z]+) = VAR ([A-Z]+) ", context)
    assert len(first) == 1
    names = [first[0][0]]
    for name, other in hops:
        assert other == names[-1]
        names.append(name)
    return first[0][1], names


def test_tracking_shows_a_solved_example_first(make):
    for sample in make("ruler_vt"):
        example, asked = sample.prompt.split("\n\n\n\n")
        match = re.fullmatch(TRACK + r"  (?P<answer>[A-Z ]+)", example, re.DOTALL)
        value, names = chain(match["context"])
        assert match["value"] == value and match["answer"] == " ".join(names)
        assert len(names) == 5 and all(re.fullmatch("[A-Z]{3}", name) for name in names)
        assert match["context"].count(GRASS + "\n") == 10
        match = re.fullmatch(TRACK, asked, re.DOTALL)
        other, names = chain(match["context"])
        assert match["value"] == other != value and match["count"] == "5"
        assert tuple(names) == sample.references and match["prefix"] == sample.prefix
        assert all(re.fullmatch("[A-Z]{5}", name) for name in names)
        assert sample.response == " " + " ".join(names)


class Scripted:
    """A generator of given names and values; places are the first."""

    def __init__(self, names, values):
        self.names, self.values = names, values

    def choice(self, items, count, replace=True):
        return list(items)[:count] if isinstance(items, range) else list(self.names.pop(0))

    def integers(self, low, high):
        return self.values.pop(0)


def test_tracking_draws_no_name_or_value_twice(counter):
    script = Scripted(
        ["ABCDE", "ABCDE", "FGHIJ", "VAR", "KLM", "KLM", "NOP"], [11111, 11111, 22222]
    )
    example, asked = Tracking(RulerConfig("ruler_vt", num_hops=1), counter).draw(script, 0)
    assert asked.names == ("ABCDE", "FGHIJ") and asked.value == "11111"
    assert "VAR KLM = 22222" in example and "VAR NOP = VAR KLM " in example
    assert not script.names and not script.values


def test_tracking_without_example(make):
    for sample in make("ruler_vt", with_example=False, num_hops=2):
        match = read(TRACK, sample)
        _, names = chain(match["context"])
        assert match["count"] == "3" and tuple(names) == sample.references
        # Without the statements nothing but noise is left, line by line, the last one cut.
        noise = re.sub(r"VAR [A-Z]+ = (\d{5} |VAR [A-Z]+  )", "", match["context"])
        *lines, last, empty = noise.split("\n")
        assert lines[0] == GRASS and set(lines[1:]) == {" " + GRASS} and empty == ""
        assert (" " + GRASS).startswith(last)
        # Every statement has noise behind it, and no two stand side by side.
        assert not re.search(r"VAR [A-Z]+ = \d{5} VAR|VAR [A-Z]+ = VAR [A-Z]+  VAR", sample.prompt)


def test_tracking_stands_between_sentences_where_lines_are_few(make):
    for sample in make("ruler_vt", 700, with_example=False):
        match = read(TRACK, sample)
        _, names = chain(match["context"])
        assert len(names) == 5 and match["context"].count("again.") <= 5
        assert not re.search(r"VAR [A-Z]+ = \d{5} VAR|VAR [A-Z]+ = VAR [A-Z]+  VAR", sample.prompt)


def test_tracking_keeps_its_chain_without_room_for_noise(counter):
    config = RulerConfig("ruler_vt", 4000, with_example=False)
    least = RulerTask(config, counter).least_length
    sample = RulerTask(RulerConfig("ruler_vt", least, with_example=False), counter).sample(0)
    _, names = chain(read(TRACK, sample)["context"])
    assert tuple(names) == sample.references and len(names) == 5


def counts_of(context):
    """Word -> how often the numbered list has it; the numbers must be those of a list."""
    entries = re.findall(r"(\d+)\. (.+?)(?= \d+\. |$)", context)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    assert context == " ".join(f"{number}. {word}" for number, word in entries)
    return collections.Counter(word for _, word in entries)


@pytest.mark.parametrize(
    ("length", "shown", "listed"),
    [(4000, (3, 10, 1, 10), (6, 1)), (9000, (10, 10, 3, 30), (30, 3))],
)
def test_common_words(length, shown, listed, make):
    often, common, seldom, uncommon = shown
    for sample in make("ruler_cwe", length, count=10):
        match = read(rf"(?P<example>.*)\n{COMMON}", sample)
        assert match["count"] == "10" and match["prefix"] == sample.prefix
        counts = counts_of(match["context"])
        assert {word for word, n in counts.items() if n == listed[0]} == set(sample.references)
        assert set(counts.values()) == set(listed) and len(sample.references) == 10
        example = re.fullmatch(COMMON + r"(?P<answer>.*)", match["example"])
        counts = counts_of(example["context"])
        assert collections.Counter(counts.values()) == {often: common, seldom: uncommon}
        answer = re.findall(r"\d+\. (.+?)(?= \d+\. |$)", example["answer"])
        assert example["answer"] == "".join(f" {i}. {w}" for i, w in enumerate(answer, 1))
        assert set(answer) == {word for word, n in counts.items() if n == often}
        numbered = (f" {i}. {word}" for i, word in enumerate(sample.references, 1))
        assert sample.response == "".join(numbered)


def test_common_words_without_example_fill_the_length(make):
    for sample in make("ruler_cwe", with_example=False, num_common=3):
        match = read(COMMON, sample)
        counts = counts_of(match["context"])
        assert match["count"] == "3" and len(sample.references) == 3
        assert {word for word, n in counts.items() if n == 6} == set(sample.references)
        assert sample.length >= 0.99 * 4000


@pytest.mark.parametrize("length", [700, 777, 4000, 30_000])
def test_frequent_words_follow_zipf(length, make):
    for sample in make("ruler_fwe", length, count=5):
        match = read(FREQUENT, sample)
        assert match["prefix"] == sample.prefix
        counts = collections.Counter(match["context"].split(" "))
        dots = counts.pop("...")
        assert all(re.fullmatch("[a-z]{6}", word) for word in counts)
        ranked = counts.most_common()
        assert {word for word, _ in ranked[:3]} == set(sample.references)
        assert ranked[2][1] > (ranked[3][1] if len(ranked) > 3 else 0)
        seen = [dots, *(n for _, n in ranked)]
        # Some n has these counts, but for dots that fill the rest of the length.
        share = 6 / math.pi**2
        expected = [
            [math.floor(share * n / k**2) for k in range(1, len(seen) + 2)]
            for n in range(int(4 / share * seen[1]), int(4 / share * (seen[1] + 1)) + 1)
        ]
        assert any(row[1:-1] == seen[1:] and row[0] <= dots for row in expected)
        assert ranked[0][1] < dots


def test_frequent_words_are_never_a_tie():
    # Of 42 to 52 words the counts of ranks 4 and 5 are the same by the definition.
    for length in range(131, 175):
        sample = RulerTask(RulerConfig("ruler_fwe", length), str.split).sample(0)
        counts = collections.Counter(read(FREQUENT, sample)["context"].split(" "))
        del counts["..."]
        least = min(counts[word] for word in sample.references)
        assert least > max((n for w, n in counts.items() if w not in sample.references), default=0)
        assert sample.length == length


def test_uncommon_words_stand_as_often_where_the_lists_run_out():
    sample = RulerTask(RulerConfig("ruler_cwe", 131_072), str.split).sample(1)
    counts = counts_of(read(rf"(?P<example>.*)\n{COMMON}", sample)["context"])
    assert set(counts.values()) == {30, 3} and len(counts) > 9000


def test_questions(make):
    instruction = (
        "Answer the question based on the given documents. Only give me the answer and do not "
        "output any other words."
    )
    for task in ("ruler_qa_squad", "ruler_qa_hotpot"):
        for sample in make(task):
            texts = re.split(r"\n\n(?=Document \d+:\n|Answer)", sample.prompt)
            assert texts[0] == f"{instruction}\n\nThe following are given documents."
            documents = [text.split(":\n", 1) for text in texts[1:-1]]
            count = len(documents)
            assert [head for head, _ in documents] == [f"Document {i + 1}" for i in range(count)]
            assert len({text for _, text in documents}) == count > 10
            pattern = re.escape(instruction) + r"\n\nQuestion: [^\n]+\? Answer:"
            assert re.fullmatch(pattern, texts[-1])
            assert sample.prefix == "Answer:" and len(sample.references) == 1
            # Only the document that fills the length is cut.
            assert sum(not text.endswith(".") for _, text in documents) <= 1

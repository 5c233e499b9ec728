"""Score replies with lm-evaluation-harness's own functions: writes scores.json beside this file.

    python tests/golden/harness/record.py

The replies are made here: right, partly right, wrong and empty, in odd case, with white space and
control characters around and inside a reference.
"""

import json
import random
from pathlib import Path

FILE = Path(__file__).with_name("scores.json")
KINDS = ("string_match_all", "string_match_part", "babilong")
NAMES = ("bathroom", "the Football", "XKOAY", "4829163", "Zoë", "São Paulo", "milk", "well-known")
CONTROL = ("\x00", "\t", "\n", "\x1f", "\r\n", "\x0b")


def reply(rng: random.Random, references: list[str]) -> str:
    """A reply that has some of the references, spelled in some way."""
    found = [name for name in references if rng.random() < 0.6]
    words = rng.sample(NAMES, rng.randrange(3)) + found
    rng.shuffle(words)
    text = rng.choice((" ", ", ", "\n", "")).join(words)
    text = rng.choice((str, str.upper, str.lower, str.title, str.swapcase))(text)
    if text and rng.random() < 0.5:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(CONTROL) + text[at:]
    ends = ("", " ", "\n\n", "\x00", ".", "\u00a0")
    return rng.choice(ends) + text + rng.choice(ends)


def cases() -> list[dict]:
    """200 replies with their references, and what the harness says of each."""
    from lm_eval.tasks.babilong import common_utils as babilong
    from lm_eval.tasks.ruler import common_utils as ruler

    rng, found = random.Random(0), []
    for number in range(200):
        kind = KINDS[number % len(KINDS)]
        references = rng.sample(NAMES, 1 if kind == "babilong" else rng.randint(1, 4))
        said = "" if number % 40 == 39 else reply(rng, references)
        doc = {"outputs": references, "target": references[0], "max_length": 1024}
        if kind == "babilong":
            score = babilong.process_results(doc, [said])["acc"]
        elif kind == "string_match_all":
            score = ruler.process_results(doc, [said])["1024"]
        else:
            score = ruler.process_results_part(doc, [said])["1024"]
        found.append({"kind": kind, "references": references, "reply": said, "score": score})
    return found


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(case) for case in cases())
    FILE.write_text(f"[\n{lines}\n]\n")

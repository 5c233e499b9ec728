"""What a reply scores that names things of the context without having understood any of it."""

import re

from memdlm_jax.evaluation.ruler.task import RulerSample

_CANDIDATES = {
    "niah": re.compile(r"One of the special magic \w+ for .+? is: (\S+)\."),
    "ruler_vt": re.compile(r"VAR (\w+) ="),
    "ruler_cwe": re.compile(r"\s\d+\. (.+?)(?= \d+\. |\n)"),
    "ruler_fwe": re.compile(r"\b([a-z]{6})\b"),
}
_BEGINS = {
    "niah": "hidden within the following text",
    "ruler_vt": "Memorize and track",
    "ruler_cwe": "Below is a numbered list",
    "ruler_fwe": "coded words. ",
}


def chance_floor(sample: RulerSample) -> float | None:
    """Expected score of naming as many candidates of the context at random as are asked for.

    Candidates are the values of all needles, all variables, all listed words, all coded words:
    each of r references is among r of N drawn ones with chance r / N. It is 1 where the context
    holds nothing else, so a score of 1 then tells no more than that values were found.

    Returns:
        In (0, 1]; ``None`` for questions about documents, which have no list of candidates.
    """
    kind = "niah" if sample.task.startswith("niah") else sample.task
    if kind not in _CANDIDATES:
        return None
    # Behind a solved example, and before the question.
    text = sample.prompt.rsplit(_BEGINS[kind], 1)[-1].rsplit("\nQuestion:", 1)[0] + "\n"
    candidates = {match.lower() for match in _CANDIDATES[kind].findall(text)}
    return len(sample.references) / len(candidates)

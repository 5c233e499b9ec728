"""Documents of the toy tasks, without any file or network."""

import datasets

STORIES = (
    ("the cat sat on", "mats", ("mats", "how every bird", "green")),
    ("how every green bird", "flew", ("saw", "flew", "the cat")),
    ("and saw how", "every", ("every", "cat sat")),
)


def load(**_):
    """Three documents."""
    rows = [
        {"text": text, "answer": answer, "choices": list(choices), "gold": choices.index(answer)}
        for text, answer, choices in STORIES
    ]
    return {"test": datasets.Dataset.from_list(rows)}

import dataclasses

import pytest

from memdlm_jax.data.needles import NeedleConfig
from memdlm_jax.evaluation import needles, retrieval, statistics
from memdlm_jax.evaluation import retrieval_probes as probes
from memdlm_jax.evaluation.retrieval import RetrievalConfig

TASK = NeedleConfig(split="test", template="short")
CONFIG = RetrievalConfig(TASK, lengths=(128,), num_keys=(2,), episodes=5, attention=False)


def test_episodes_are_those_of_the_needle_suite_and_controls_hold_other_values(
    tokenizer, sentences
):
    task = dataclasses.replace(TASK, value_digits=1)
    config = dataclasses.replace(CONFIG, task=task, num_keys=(2, 3), episodes=6)
    suite = needles.NeedleSuite(task, (128,), (2, 3), 6)
    same = needles.draw_episodes(suite, tokenizer, sentences)
    cells = retrieval.draw(config, tokenizer, sentences)
    texts = []
    for task, (here, others) in cells.items():
        assert [p.passage for p in here] == [probes.of_episode(e) for e in same[task]]
        for one, other in zip(here, others, strict=True):
            assert not set(one.passage.values) & set(other.passage.all_values)
        texts += [p.passage.context for p in (*here, *others)]
    assert len(set(texts)) == len(texts) == 24
    few = retrieval.draw(dataclasses.replace(config, num_keys=(2,)), tokenizer, sentences)
    assert [p.prompt for p in few[config.cells[0]][0]] == [
        p.prompt for p in cells[config.cells[0]][0]
    ]
    crowded = dataclasses.replace(config, num_keys=(9,), lengths=(300,))
    with pytest.raises(ValueError, match="num_keys=9 and value_digits=1: none of 1000 other"):
        retrieval.draw(crowded, tokenizer, sentences)


def test_depth_and_length_are_pooled_over_cells():
    def cell(*parts):
        bounds = ((0.0, 0.5), (0.5, 1.0))
        return [
            {"from": a, "to": b, "n": n, "value": hits / n if n else None}
            for (a, b), (hits, n) in zip(bounds, parts, strict=True)
        ]

    cells = [(256, cell((1, 3), (0, 0))), (128, cell((2, 2), (1, 4))), (256, cell((2, 7), (0, 0)))]
    table = retrieval.by_depth_and_length(cells)
    assert (table["lengths"], table["depths"]) == ([128, 256], [[0.0, 0.5], [0.5, 1.0]])
    values = [[(c["value"], c["n"]) for c in row] for row in table["cells"]]
    assert values == [[(1.0, 2), (0.25, 4)], [(0.3, 10), (None, 0)]]
    assert table["cells"][1][0]["interval"] == list(statistics.wilson_interval(3, 10))
    assert table["cells"][1][1]["interval"] == [0.0, 1.0]
    with pytest.raises(ValueError, match="2 divisions"):
        retrieval.by_depth_and_length([cells[0], (64, cells[0][1][:1])])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"episodes": 1}, "retrieval.episodes=1 must be at least 2"),
        ({"seed": -1}, "retrieval.seed=-1 must be at least 0"),
        ({"lengths": ()}, "retrieval.lengths is empty"),
        ({"num_keys": (2, 2)}, r"retrieval.num_keys=\(2, 2\) must not repeat"),
        ({"written": "answer"}, "retrieval.written='answer' must be 'prompt' or 'context'"),
        ({"conditions": ("hidden",)}, r"retrieval.conditions has \['hidden'\]; there are full,"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **settings)

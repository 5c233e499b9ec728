"""Options of the harness's own command line, beside those of the model."""

import pytest

pytest.importorskip("lm_eval")

from experiments import lm_eval as script


def test_options_of_the_harness_beside_the_arguments():
    given = {"pretrained": "m"}
    assert script.with_options(given, {"batch_size": None, "device": None}) == given
    assert script.with_options(given, {"batch_size": "4", "device": "cpu"})["batch_size"] == 4
    kept = script.with_options(given | {"batch_size": 8}, {"batch_size": 1, "device": "cuda:0"})
    assert kept["batch_size"] == 8
    for options, said in (
        ({"batch_size": "auto"}, "--batch_size auto must be a whole number"),
        ({"batch_size": 4}, "--batch_size 4 and batch_size=8 of model_args differ"),
        ({"device": "tpu"}, "--device tpu: JAX runs on 'cpu'"),
        ({"max_batch_size": 9}, "--max_batch_size is for --batch_size auto"),
    ):
        with pytest.raises(ValueError, match=said):
            script.with_options(given | {"batch_size": 8}, options)

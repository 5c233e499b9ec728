"""The loss alone, compiled and counted."""

import jax
import pytest

from benchmarks import chunked_loss
from memdlm_jax.training.sharding import Layout, MeshConfig
from memdlm_jax.training.topology import Topology
from tests.models.small import small


@pytest.mark.parametrize("chunk", [0, 10])
def test_chunks_cost_one_more_product(chunk):
    layout = Layout(MeshConfig().build(jax.devices()[:1]))
    model = small("llada").with_config(vocab_chunk=chunk)
    report = chunked_loss.compiled(Topology("cpu:1"), layout, model, 12)
    assert report.model_flops == 3 * 2 * 12 * model.config.width * model.config.vocab_size
    assert report.costs.flops == report.model_flops * (4 / 3 if chunk else 1)
    assert chunked_loss.line(chunk, report, 1).startswith(f"| {chunk or 'all'} | 0.000 |")

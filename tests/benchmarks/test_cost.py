"""The counts of docs/cost.md, by hand, against the traced step and against the compiler."""

import dataclasses

import flax.linen as nn
import jax
import pytest

from benchmarks._shapes import Shape
from benchmarks.step import VARIANTS, program
from memdlm_jax.models import block, transformer
from memdlm_jax.training import flops

SHAPE = Shape(96, 4, 2, 24, 8, 0.25, width=32, hidden_features=48, num_heads=2, rank=4)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Forward products of one pass over a ``Shape``, in FLOPs; the letters of docs/cost.md."""

    shape: Shape

    @property
    def layer(self):
        """A: one layer at all positions."""
        s = self.shape
        tokens = s.rows * s.length
        maps = 4 * s.width**2 + 3 * s.width * s.hidden_features
        return 2 * tokens * maps + 4 * tokens * s.length * s.width

    @property
    def last_layer(self):
        """Z: Y and the feed-forward block at the targets."""
        s = self.shape
        return self.last_attention + 6 * s.rows * s.response * s.width * s.hidden_features

    @property
    def last_attention(self):
        """Y: keys and values everywhere, the rest of an attention block at the targets."""
        s = self.shape
        slots = s.rows * s.response
        everywhere = 2 * s.rows * s.length * 2 * s.width**2
        return everywhere + 2 * slots * 2 * s.width**2 + 4 * slots * s.length * s.width

    @property
    def readout(self):
        """R: logits at the targets."""
        s = self.shape
        return 2 * s.rows * s.response * s.width * s.vocab_size

    @property
    def mdlm(self):
        """Every product has two more in the backward pass."""
        return 3 * ((self.shape.num_layers - 1) * self.layer + self.last_layer + self.readout)

    @property
    def first_order(self):
        """K = 2, one adapted layer: see docs/cost.md."""
        s = self.shape
        slots = s.rows * s.response
        down = 2 * slots * s.hidden_features * s.width
        # x A and (x A) B of gate, up and down.
        low_rank = 3 * 2 * slots * s.rank * (s.width + s.hidden_features)
        out = 2 * slots * s.rank * (2 * s.hidden_features + s.width)
        into = 2 * slots * s.rank * (2 * s.width + s.hidden_features)
        into_down = 2 * slots * s.rank * s.hidden_features
        # Back from the logits to the last hidden state, through down to gate and up; for A and B
        # their own products, and what flows on through the fast weight of down.
        backward = self.readout + down + 2 * out + into + into_down
        feed_forward = self.last_layer - self.last_attention
        inner = feed_forward + self.readout + low_rank + backward
        trunk = (s.num_layers - 1) * self.layer + self.last_attention
        return self.mdlm + trunk + 2 * inner + 2 * low_rank


def counted(shape, name):
    state, frozen = shape.state(shapes_only=True)
    arguments = state, frozen, shape.batch(), jax.random.key(0)
    return flops.matmul_flops(program(shape, VARIANTS[name]), *arguments)


@pytest.mark.parametrize("name", ["mdlm", "first_order", "first_order, global"])
def test_counts_by_hand_are_those_of_the_traced_step(name):
    """One memory for all rows takes the products of one for each."""
    assert counted(SHAPE, name) == getattr(Counts(SHAPE), name.split(",")[0])


@pytest.mark.parametrize("name", ["mdlm", "first_order"])
def test_the_compiler_counts_the_same_within_five_per_cent(name, monkeypatch):
    """On an unrolled model: of a scan the compiler counts the body once."""
    shape = Shape(1024, 4, 2, 128, 64, 0.25, width=128, hidden_features=344, num_heads=2)

    def unrolled(config, run, length, keep=False, first=0):
        return nn.scan(
            block.block_of(config, first), length=length, unroll=length,
            variable_axes={"params": 0, "fast": 0, "intermediates": 0},
            split_rngs={"params": True}, in_axes=(nn.broadcast, nn.broadcast, 0),
        )(config, run.mixture, keep)  # fmt: skip

    state, frozen = shape.state()
    monkeypatch.setattr(transformer, "stack_of", unrolled)
    arguments = state, frozen, shape.batch(), jax.random.key(0)
    compiled = jax.jit(program(shape, VARIANTS[name])).lower(*arguments).compile()
    assert compiled.cost_analysis()["flops"] == pytest.approx(counted(shape, name), rel=0.05)


def test_memory_of_the_exact_gradient_hardly_grows_with_the_inner_steps():
    """A step keeps its fast weights and what they read, nothing of its trunk."""
    deep = dataclasses.replace(SHAPE, rows=4, length=64, num_layers=16, layer_fraction=0.05)
    state, frozen = deep.state(shapes_only=True)
    arguments = state, frozen, deep.batch(), jax.random.key(0)
    found = []
    for steps in (3, 6):
        memory = {"meta_gradient": "exact", "steps": steps}
        compiled = jax.jit(program(deep, {"memory": memory, "remat": "full"})).lower(*arguments)
        found.append(compiled.compile().memory_analysis().temp_size_in_bytes)
    phi = 4 * deep.rows * 3 * deep.rank * (deep.width + deep.hidden_features)
    read = 4 * deep.rows * deep.response * deep.width
    inputs_of_layers = 4 * deep.rows * deep.length * deep.width * (deep.num_layers - 1)
    assert (found[1] - found[0]) / 3 < 4 * phi + 2 * read < inputs_of_layers / 4

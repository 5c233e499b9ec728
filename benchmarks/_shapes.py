"""Models and batches that training is measured on."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import inner_loop_for
from memdlm_jax.models import lora
from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.models.lora import LoraConfig
from memdlm_jax.parameters import partition
from memdlm_jax.training import state as states
from memdlm_jax.training.optimizer import OptimizerConfig
from memdlm_jax.training.state import TrainState
from memdlm_jax.training.step import StepSetup
from memdlm_jax.typing import Batch, Theta


@dataclasses.dataclass(frozen=True)
class Shape:
    """One workload.

    Attributes:
        vocab_size: of the embedding.
        num_layers: transformer layers.
        rows: of the batch.
        length: of the rows, in tokens.
        response: last tokens of every row, which are maskable.
        layer_fraction: share of the layers that adapt.
        width: of the residual stream.
        hidden_features: of the feed-forward blocks.
        num_heads: attention heads.
        rank: of the fast weights.
        lora_rank: of the outer adapters, if they alone are trained; 0 trains everything.
    """

    vocab_size: int
    num_layers: int
    rows: int
    length: int
    response: int
    layer_fraction: float
    width: int = 256
    hidden_features: int = 688
    num_heads: int = 8
    rank: int = 16
    lora_rank: int = 0

    def denoiser(self, remat: Any = "none", dtype: str = "float32") -> LLaDA:
        """The model; its parameters are float32."""
        return LLaDA(
            LLaDAConfig(
                vocab_size=self.vocab_size, width=self.width, num_layers=self.num_layers,
                num_heads=self.num_heads, num_kv_heads=self.num_heads,
                hidden_features=self.hidden_features, mask_token_id=self.vocab_size - 1,
                max_length=self.length, tied=True, remat=remat, dtype=dtype,
            )
        )  # fmt: skip

    def memory(self, **changes: Any) -> MemoryConfig:
        """The paper's settings at this size."""
        settings = {"layer_fraction": self.layer_fraction, "rank": self.rank}
        return MemoryConfig(**(settings | {"alpha": 2.0 * self.rank} | changes))

    def batch(self) -> Batch:
        """Random rows whose last ``response`` tokens are maskable."""
        shape = (self.rows, self.length)
        tokens = np.random.default_rng(0).integers(0, self.vocab_size - 1, shape, np.int32)
        maskable = np.broadcast_to(np.arange(self.length) >= self.length - self.response, shape)
        return Batch(jnp.asarray(tokens), jnp.asarray(maskable), jnp.ones(shape, bool))

    def state(self, shapes_only: bool = False) -> tuple[TrainState, Theta]:
        """The state before the first step, and what is not trained (or ``None``)."""

        def build(key):
            theta = self.denoiser().init(key)
            if not self.lora_rank:
                return states.create(theta, OPTIMIZER), None
            config = LoraConfig(rank=self.lora_rank, alpha=2.0 * self.lora_rank)
            parted = partition(lora.add(key, self.denoiser(), theta, config), lora.is_adapter)
            return states.create(parted.trainable, OPTIMIZER), parted.frozen

        make = jax.eval_shape if shapes_only else lambda f, key: jax.jit(f)(key)
        return make(build, jax.random.key(0))

    def setup(self, memory: MemoryConfig | None, remat: Any = "none") -> StepSetup:
        """What is static about a step."""
        denoiser = self.denoiser(remat)
        inner_loop = inner_loop_for(denoiser, memory)
        return StepSetup(denoiser, OPTIMIZER, inner_loop, capacity=self.response)


OPTIMIZER = OptimizerConfig(total_steps=1000)

SHAPES = {
    # The smallest, and short rows in a batch.
    "small": Shape(2048, 4, 8, 128, 64, 0.25, width=128, hidden_features=344, num_heads=4),
    "B": Shape(8192, 8, 4, 256, 128, 0.25),
    # A long prompt with a short response, and a vocabulary as public models have it.
    "P": Shape(32000, 8, 2, 1024, 64, 0.1),
    # P with outer adapters alone, the paper's setting.
    "L": Shape(32000, 8, 2, 1024, 64, 0.1, lora_rank=32),
    # 20 layers, two of which adapt: the depth at which costs are stated.
    "deep": Shape(2048, 20, 4, 256, 128, 0.1),
}

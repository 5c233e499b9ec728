"""A structured initialisation from which in-context retrieval is learnt in minutes, not hours.

Retrieval needs two layers to cooperate: one writes, at every position, which tokens stand just
before it; a later one attends to positions where the same tokens were written and copies what
stands there (an induction circuit, Olsson et al., arXiv 2209.11895). From random weights neither
half gets a gradient before the other exists. Here both exist, noisily, from the start, in the
spirit of mimetic initialisation (Trockman and Kolter, arXiv 2305.09828). Training changes every
parameter afterwards; the architecture and the published weight format are untouched.

Residual channels: 0 holds a constant, 1 marks the mask token, the last ``written_channels`` receive
what the positional heads write, the rest hold the token's content.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from memdlm_jax.models.llada import LLaDA, LLaDAConfig
from memdlm_jax.typing import Key, Theta


@dataclasses.dataclass(frozen=True)
class InductionInit:
    """Strengths of the structure; the defaults were found by short trials at width 128.

    Attributes:
        positional_layer: layer whose heads look at fixed offsets.
        matching_layers: layers that attend by what the positional heads wrote.
        offsets: relative position each positional head looks at; one per head, reused in a cycle.
        spreads: how far around it the head looks, in tokens; 0 is as sharp as the rotary
            frequencies allow.
        sharpness: attention score (in nats) of a positional head at its offset.
        matching: attention score of a full match.
        copying: gain of value and output maps in the matching layers.
        mask_aversion: how strongly mask tokens are avoided as keys there.
        written_channels: residual channels for what positional heads write.
        constant: value of channel 0 in every embedding.
        noise: factor on the ordinary random initialisation of the attention matrices.
        mlp_gain: factor on the ordinary initialisation of the MLPs' output: at full size they drown
            the embeddings of an untrained model.
    """

    positional_layer: int = 0
    matching_layers: tuple[int, ...] = (2, 3)
    offsets: tuple[int, ...] = (-1, -2, -6, -6)
    spreads: tuple[float, ...] = (0.0, 0.0, 3.0, 3.0)
    sharpness: float = 24.0
    matching: float = 12.0
    copying: float = 1.0
    mask_aversion: float = 40.0
    written_channels: int = 48
    constant: float = 0.5
    noise: float = 0.3
    mlp_gain: float = 0.05

    def check(self, config: LLaDAConfig) -> None:
        """Raise ValueError, naming the field, if this does not fit a model of that size."""
        first = min(self.matching_layers, default=0)
        if not 0 <= self.positional_layer < first <= max(self.matching_layers) < config.num_layers:
            raise ValueError(
                f"init.matching_layers={self.matching_layers} must lie after positional_layer="
                f"{self.positional_layer} and below num_layers={config.num_layers}"
            )
        if not config.tied or config.num_kv_heads != config.num_heads:
            raise ValueError("the induction init needs a tied model with num_kv_heads == num_heads")
        content = config.width - 2 - self.written_channels
        if not 1 <= self.written_channels // config.num_heads <= content > config.num_heads:
            raise ValueError(
                f"init.written_channels={self.written_channels} must hold num_heads="
                f"{config.num_heads} and leave room for the content in width={config.width}"
            )
        if not len(_stable_frequencies(config)):
            raise ValueError(
                f"width={config.width} over num_heads={config.num_heads} leaves no rotary channel "
                "that turns slowly enough to compare content; use fewer heads"
            )


def init(key: Key, denoiser: LLaDA, settings: InductionInit) -> Theta:
    """Draw parameters with the structure described above; same tree as ``denoiser.init``.

    Raises:
        ValueError: if the settings do not fit the model.
    """
    settings.check(denoiser.config)
    plain = denoiser.init(key)
    theta = jax.tree.map(lambda leaf: np.array(leaf, np.float64), plain)
    rng = np.random.default_rng(np.asarray(theta["embedding"][0]).view(np.uint32))
    maps = _Maps(denoiser.config, settings, rng)
    attention = {name: m["kernel"] for name, m in theta["layers"]["attention"].items()}
    for kernel in attention.values():
        kernel *= settings.noise
    theta["layers"]["mlp"]["down_proj"]["kernel"] *= settings.mlp_gain
    theta["embedding"][:] = maps.embedding()
    heads = range(denoiser.config.num_heads)
    for head in heads:
        maps.add_positional_head(attention, head)
    for layer in settings.matching_layers:
        # Heads of a layer copy orthogonal shares of the content, so that together they copy it all.
        basis = maps.orthogonal(maps.content_size)
        for head in heads:
            maps.add_matching_head(attention, layer, head, basis)
    return jax.tree.map(lambda new, leaf: jnp.asarray(new, leaf.dtype), theta, plain)


def _frequencies(config: LLaDAConfig) -> np.ndarray:
    """Rotary frequencies of a head, in radians per token."""
    half = config.width // config.num_heads // 2
    return config.rope_theta ** (-np.arange(half) / half)


def _stable_frequencies(config: LLaDAConfig) -> np.ndarray:
    """Indices of those that hardly turn within 256 tokens: there a dot product is content alone."""
    return np.flatnonzero(_frequencies(config) * 256 < 1.5)


class _Maps:
    """The pieces of the circuit for one model size."""

    def __init__(self, config: LLaDAConfig, settings: InductionInit, rng: np.random.Generator):
        self.config, self.settings, self.rng = config, settings, rng
        self.head_dim = config.width // config.num_heads
        self.frequencies = _frequencies(config)
        stable = _stable_frequencies(config)
        self.stable = np.concatenate([stable, stable + self.head_dim // 2])
        self.content = slice(2, config.width - settings.written_channels)
        self.content_size = self.content.stop - self.content.start
        # Value of channel 0 behind the RMSNorm of an embedding of squared norm 1 + constant^2.
        c = settings.constant
        self.unit = np.sqrt(config.width / (1 + c**2))
        self.constant = c * self.unit

    def embedding(self) -> np.ndarray:
        """Random content of about unit norm, the constant, and the mark of the mask token."""
        c = self.config
        table = np.zeros((c.vocab_size, c.width))
        size = (c.vocab_size, self.content_size)
        table[:, self.content] = self.rng.normal(size=size) * self.content_size**-0.5
        table[c.mask_token_id] = 0
        table[c.mask_token_id, 1] = 1
        table[:, 0] = self.settings.constant
        return table

    def orthogonal(self, size: int) -> np.ndarray:
        """A random orthogonal matrix."""
        return np.linalg.qr(self.rng.normal(size=(size, size)))[0]

    def columns(self, head: int) -> slice:
        """Columns of one head in the projections."""
        return slice(head * self.head_dim, (head + 1) * self.head_dim)

    def add_positional_head(self, attention: dict[str, np.ndarray], head: int) -> None:
        """Attend to a fixed offset and write a projection of the content found there.

        From the constant channel, q and k give score(i, j) = sum_f a_f cos(f (j - i - offset)).
        """
        s, half = self.settings, self.head_dim // 2
        offset, spread = (x[head % len(x)] for x in (s.offsets, s.spreads))
        used = (self.frequencies * spread < 1.2).astype(float)
        gain = (s.sharpness / used.sum() * self.head_dim**0.5) ** 0.5 * (1.5 if spread else 2.0)
        phase = -offset * self.frequencies
        query = np.concatenate([used, np.zeros(half)])
        key = np.concatenate([used * np.cos(phase), used * np.sin(phase)])
        layer, columns = s.positional_layer, self.columns(head)
        attention["q_proj"][layer, 0, columns] += query * gain / self.constant
        attention["k_proj"][layer, 0, columns] += key * gain / self.constant
        size = min(s.written_channels // self.config.num_heads, self.head_dim)
        first = self.content.stop + head * size
        rows = np.arange(columns.start, columns.start + size)
        project = self.orthogonal(self.content_size)[:, :size]
        attention["v_proj"][layer, self.content, rows[0] : rows[-1] + 1] += project
        scale = (self.content.stop / size) ** 0.5 / self.unit
        attention["o_proj"][layer, rows, first + np.arange(size)] += scale

    def add_matching_head(
        self, attention: dict[str, np.ndarray], layer: int, head: int, basis: np.ndarray
    ) -> None:
        """Attend to where the same was written, avoid masks, copy a share of the content."""
        s, columns = self.settings, self.columns(head)
        size = min(len(self.stable) - 1, s.written_channels)
        gain = (s.matching / size * self.head_dim**0.5) ** 0.5
        match = self.orthogonal(s.written_channels)[:, :size] * gain
        slots = columns.start + self.stable[:size]
        for name in ("q_proj", "k_proj"):
            attention[name][layer, self.content.stop :, slots] += match.T
        # One stable channel is kept for "do not look at masks".
        slot = columns.start + self.stable[-1]
        attention["q_proj"][layer, 0, slot] += 3.0
        aversion = s.mask_aversion * self.head_dim**0.5 / (18.0 * self.constant)
        attention["k_proj"][layer, 1, slot] -= aversion
        share = self.content_size // self.config.num_heads
        copy = basis[:, head * share : (head + 1) * share] * s.copying**0.5
        to = slice(columns.start, columns.start + share)
        attention["v_proj"][layer, self.content, to] += copy
        attention["o_proj"][layer, to, self.content] += 0.3 * copy.T

"""A denoiser whose knowledge is plain: of what follows a token, from the context or from memory."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np

from memdlm_jax.typing import EVERYTHING

MASK, PAD, END, SIZE = 0, 1, 2, 60
IN_VIEW = 3.0
"""Logit of a token that follows, somewhere in view, the same token as the position to fill."""

TOKENIZER = types.SimpleNamespace(
    pad_id=PAD, eos_id=END, end_of_turn_id=END, decode=lambda ids: " ".join(map(str, ids))
)


@dataclasses.dataclass(frozen=True)
class BigramDenoiser:
    """Logits are IN_VIEW for what follows the left neighbour elsewhere, and one row of phi."""

    num_layers: int = 2
    mask_token_id: int = MASK

    def trunk(self, theta, tokens, context=EVERYTHING, *, split):
        del theta, split
        seen = (tokens != MASK) & context.attend
        left = jax.nn.one_hot(tokens, SIZE) * seen[..., None]
        left = jnp.concatenate([jnp.zeros_like(left[:, :1]), left[:, :-1]], axis=1)
        follows = jax.nn.one_hot(tokens, SIZE) * seen[..., None]
        votes = jnp.einsum("bqv,bkv,bkw->bqw", left, left, follows)
        return jnp.concatenate([left, IN_VIEW * jnp.minimum(votes, 1)], axis=-1)

    def head(self, theta, phi, hidden, context=EVERYTHING, *, split):
        del theta, context, split
        if phi is None:
            return hidden
        left, logits = jnp.split(hidden, 2, axis=-1)
        weight = jax.tree.map(lambda leaf: leaf[0], phi["mlp"]["up_proj"]["delta"])
        return jnp.concatenate([left, logits + weight(left)], axis=-1)

    def normalise(self, theta, last_hidden):
        return last_hidden

    def readout(self, theta, last_hidden):
        return last_hidden[..., SIZE:]

    def unembedding(self, theta):
        return jnp.eye(2 * SIZE, SIZE, -SIZE)

    def adaptable(self, split=0):
        return {"mlp/up_proj": (2 - max(split, 1), SIZE, SIZE)}


def log_probability(tokens, seen, place, label, table=None):
    """What it says of one masked place, by loops; ``table`` is the matrix of a memory."""
    logits = np.zeros(SIZE)
    left = tokens[place - 1]
    if seen[place - 1] and left != MASK:
        for other in range(1, len(tokens)):
            before, after = tokens[other - 1], tokens[other]
            if seen[other] and seen[other - 1] and before == left and after != MASK:
                logits[after] = IN_VIEW
        if table is not None:
            logits = logits + table[left]
    return logits[label] - np.log(np.exp(logits).sum())

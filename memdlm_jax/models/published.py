"""The backbones of the package, and the published models, full size and without weights."""

# Importing a backbone registers it: a new one needs its name here.
from memdlm_jax.models import dream, llada, llada2, llada_moe  # noqa: F401
from memdlm_jax.models.transformer import Transformer
from memdlm_jax.registry import BACKBONES

PUBLISHED: dict[str, Transformer] = {
    name: backbone(config)
    for backbone in map(BACKBONES, BACKBONES.names())
    for name, config in backbone.family.releases.items()
}
"""Name -> denoiser; ``checkpoints`` loads weights."""

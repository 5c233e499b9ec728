"""Memory-Enhanced Diffusion Language Models in JAX and Flax."""

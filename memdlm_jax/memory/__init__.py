"""The Parametric Memory: fast weights written along a denoising trajectory.

Read in this order: ``config``, ``fast_weights``, ``trajectory``, ``inner_loop``, ``meta_gradient``,
``written``.
"""

from memdlm_jax.memory import written as written  # Fills the tables of named parts.

"""The Parametric Memory: fast weights written along a denoising trajectory.

Read in this order: ``config``, ``fast_weights``, ``trajectory``, ``inner_loop``, ``meta_gradient``,
``prompt_memory``.
"""

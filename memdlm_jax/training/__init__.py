"""The outer loop: optimiser, state, one step, and the loop around it."""

"""Checkpoints: published model folders, and the state of a training run."""

"""Measurements of speed: every one prints ratios of times taken in one run."""

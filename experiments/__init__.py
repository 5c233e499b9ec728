"""Scripts that people run: ``python -m experiments.NAME``."""

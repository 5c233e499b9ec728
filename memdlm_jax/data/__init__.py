"""Text to batches: tokenizer, sources, needle tasks, supervised rows, ArrayRecord files, Grain."""

"""lm-evaluation-harness: a system as one of its models, and what its requests mean here.

Only ``model`` imports the harness, which the extra ``lm-eval`` installs.
"""

"""Generate: write prompts into memory, decode, and divide the work over devices."""

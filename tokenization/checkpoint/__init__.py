"""Checkpoints on disk: safetensors and pickles, opened lazily, checked, saved atomically."""

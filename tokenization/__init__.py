"""Weights to tokens and back: checkpoints, zoos of them, layouts, readers and writers."""

"""Merges of networks: linear, SLERP, TIES, DARE and Model Stock, of tensors in memory, of files and of adapters."""

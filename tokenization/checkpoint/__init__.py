"""Checkpoints on disk: safetensors files, sharded ones and folders, opened by memory map and checked before use.

Pickles are read once, to be converted, and never run. Files are written whole or not at all.
"""

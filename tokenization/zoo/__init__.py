"""Zoos: folders of checkpoints of one structure, collected or imported."""

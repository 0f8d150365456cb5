"""Experiments: collect, train, generate and score in a row."""

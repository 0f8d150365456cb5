"""Evaluation by figures alone: those of a function of your own, or of a task without a generator."""

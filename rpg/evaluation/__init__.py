"""Evaluation of networks from their predictions and state dicts alone: it serves any task and any generator."""

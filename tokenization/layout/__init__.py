"""Layouts: where every value of a checkpoint lies among its tokens, and the way there and back."""

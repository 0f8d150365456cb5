"""Layouts: where every value of a checkpoint lies among its tokens, and the way there and back.

``placement`` gives each tensor its place, ``statistics`` measures a zoo, ``normalization`` is the arithmetic between
values and tokens, ``layout`` encodes and decodes, ``rows`` and ``reader`` read parts, ``writer`` writes checkpoints.
"""

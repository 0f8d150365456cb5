"""Layouts: where every value of a checkpoint lies among its tokens, and the way there and back.

``placement`` gives each tensor its place, ``normalization`` measures a zoo and has the arithmetic between values and
tokens, ``layout`` encodes and decodes, ``rows`` reads parts and writes checkpoints.
"""

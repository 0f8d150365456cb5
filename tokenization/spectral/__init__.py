"""Spectral tokens: every token as its coefficients along the directions in which the zoo varies there.

A zoo of n checkpoints spans at most n - 1 directions in every token, whatever the token's width. Along the k leading
ones a network of hundreds of millions of values is ``[L, k]`` numbers, and a small generator can learn it.

Letters in this folder: n checkpoints, L tokens of the cut, D token width, k directions, T spectral tokens (L, or 1
where one set of directions serves the whole network).
"""

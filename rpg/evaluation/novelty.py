"""Distances and inner products of vectors, exact where they are small."""

from __future__ import annotations

import torch
from torch import Tensor

from rpg.models.kernel_regression import exact_distances

LARGE = 1 << 14
"""Values from which on distances are computed by matrix products."""

CHUNK = 1 << 14
"""Values of each network that are converted to float64 at a time: few enough to stay in the processor's cache."""


def distances(first: Tensor, second: Tensor) -> Tensor:
    """Euclidean distance of every pair, [A, values], [B, values] → [A, B]; exactly 0 between equal vectors.

    The usual shortcut by matrix products loses the small distances between networks of one run to cancellation. Large
    networks take it in float64 around their mean, and only what is suspiciously small is computed anew.
    """
    if first.shape[1] < LARGE:
        return exact_distances(first, second)
    center = second.mean(0)
    squares = torch.zeros(len(first), len(second), dtype=torch.float64)
    products = torch.zeros_like(squares)
    for a, b, middle in zip(*(each.split(CHUNK, -1) for each in (first, second, center)), strict=True):
        a, b = (a - middle).double(), (b - middle).double()
        squares += a.square().sum(1)[:, None] + b.square().sum(1)[None]
        products += a @ b.T
    result = (squares - 2 * products).clamp(min=0)
    for row, column in (result < 1e-8 * squares).nonzero().tolist():
        result[row, column] = (first[row] - second[column]).double().square().sum()
    return result.sqrt().float()


def gram(vectors: Tensor) -> Tensor:
    """Inner products of every pair, [A, values] → float64 [A, A], without a float64 copy of all values."""
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for part in vectors.split(CHUNK, 1):
        part = part.double()
        total += part @ part.T
    return total


def leading_directions(gram: Tensor, fraction: float) -> Tensor:
    """The principal directions that hold ``fraction`` of a zoo's variance, the greatest first.

    Args:
        gram: inner products of the networks' deviations from their mean, float64 ``[K, K]``.

    Returns:
        Each direction as the weights of the deviations in it, of unit length, ``[K, k]``: with coefficients
        N(0, 1 / (K - 1)) networks vary in it as the zoo does.
    """
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.clamp(min=0).flip(0), vectors.flip(1)
    held = values.cumsum(0) / values.sum().clamp(min=1e-300)
    return vectors[:, : int((held < fraction - 1e-12).sum()) + 1]

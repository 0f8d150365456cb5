"""How far networks are from the zoo's, in their weights and in their answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rpg.evaluation.results import Spread
from rpg.evaluation.vectors import StateDict, VectorSpace
from rpg.models.kernel_regression import exact_distances

LARGE = 1 << 14
"""Values from which on distances are computed by matrix products."""

CHUNK = 1 << 14
"""Values of each network that are converted to float64 at a time: few enough to stay in the processor's cache."""


def weight_vectors(
    originals: Sequence[StateDict], networks: Sequence[StateDict], *, normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Flatten the values that vary in the zoo, [K, values] and [num, values].

    Args:
        originals: the zoo.
        networks: networks of the same structure.
        normalize: divide each layer by the standard deviation of its values in the zoo, so that distances are not
            those of the layer with the largest weights alone.
    """
    space = VectorSpace(originals)
    zoo, others = space.flatten(originals), space.flatten(networks)
    if normalize:
        scale = space.layer_scale(zoo)
        zoo, others = zoo / scale, others / scale
    return zoo, others


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


def nearest(vectors: Tensor, zoo: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to and index of each vector's nearest in the zoo: [num, values], [K, values] → [num], [num]."""
    least = distances(vectors, zoo).min(1)
    return least.values, least.indices


def nearest_within(vectors: Tensor) -> Tensor:
    """Distance of each vector to the nearest *other* one, [num, values] → [num]; infinite for a lone one."""
    return distances(vectors, vectors).fill_diagonal_(float("inf")).amin(1)


def mean_squared_deviation(vectors: Tensor, center: Tensor) -> float:
    """Mean squared Euclidean distance from ``center``: [num, values], [values] → a number."""
    parts = zip(vectors.split(CHUNK, 1), center.split(CHUNK), strict=True)
    return sum((part - middle).double().square().sum().item() for part, middle in parts) / len(vectors)


def disagreement(first: Tensor, second: Tensor) -> Tensor:
    """Share of images answered differently, for every pair: [A, images], [B, images] → float64 [A, B]."""
    if not len(first):
        return torch.empty(0, len(second), dtype=torch.float64)
    return torch.stack([(row != second).double().mean(1) for row in first])


def measure_spread(zoo: Tensor, generated: Tensor, zoo_predictions: Tensor, predictions: Tensor) -> Spread | None:
    """Compare the spread of generated networks with the zoo's.

    Args:
        zoo: [K, values] from ``weight_vectors``.
        generated: [num, values].
        zoo_predictions: [K, images].
        predictions: [num, images].

    Returns:
        None where the zoo has no spread to compare with (a single network, or all alike).
    """
    if len(zoo) < 2:
        return None
    center = zoo.mean(0, dtype=torch.float64).float()
    zoo_deviation = mean_squared_deviation(zoo, center)
    zoo_nearest = nearest_within(zoo).median().item()
    if zoo_deviation == 0 or zoo_nearest == 0:
        return None
    generated_nearest, indices = nearest(generated, zoo)
    diversity = nearest_within(generated).median().item() if len(generated) > 1 else math.nan
    return Spread(
        mean_squared_deviation_ratio=_finite(mean_squared_deviation(generated, center) / zoo_deviation),
        nearest_distance_ratio=_finite(generated_nearest.median().item() / zoo_nearest),
        diversity_ratio=_finite(diversity / zoo_nearest),
        disagreement=(predictions != zoo_predictions[indices]).double().mean().item(),
    )


def _finite(number: float) -> float | None:
    """JSON has no NaN."""
    return number if math.isfinite(number) else None

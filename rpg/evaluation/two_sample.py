"""Distances between networks, and generated networks against held-out originals by their class probabilities.

Each network is one vector, its class probabilities on the same images. The measures are those of PointFlow (Yang et
al., 2019, arXiv 1906.12320, section 5.1), taken over for weights by HyperDiffusion (arXiv 2303.17015). M networks of
either kind, F numbers a network.
"""

from __future__ import annotations

from collections.abc import Mapping

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


def nearest_neighbour_accuracy(first: Tensor, second: Tensor, between: Tensor) -> float:
    """Share of networks whose nearest neighbour is of their own kind: 0.5 where the kinds cannot be told apart.

    A network has one neighbour fewer of its own kind than of the other, which would pull small sets below 0.5.
    Therefore one of the other kind is left out, too: the mean over all choices. A tie counts half.

    Args:
        first, second: distances among each kind, ``[M, M]``, M at least 2.
        between: distances of the first to the second, ``[M, M]``.
    """
    shares = [_own_share(first, between), _own_share(second, between.T)]
    return sum(shares) / 2


def _own_share(own: Tensor, other: Tensor) -> float:
    count = len(own)
    nearest = own.clone().fill_diagonal_(float("inf")).amin(1)  # [M]
    others = other.sort(1).values[:, :2]  # the nearest, and who is nearest once that is left out
    wins = (nearest[:, None] < others).double() + 0.5 * (nearest[:, None] == others).double()
    return (wins[:, 0] * (count - 1) / count + wins[:, 1] / count).mean().item()


def coverage(between: Tensor) -> float:
    """Share of held-out networks that are the nearest of at least one made: distances ``[made, held out]``."""
    return len(between.argmin(1).unique()) / between.shape[1]


def minimum_matching_distance(between: Tensor) -> float:
    """Mean distance of a held-out network to the nearest made: distances ``[made, held out]``."""
    return between.amin(0).mean().item()


def two_sample(sets: Mapping[str, Tensor], originals: Tensor, held_out: Tensor) -> dict[str, dict[str, float]] | None:
    """Compare every kind of networks with held-out originals, by class probabilities ``[num, images, classes]``.

    Args:
        sets: the kinds; the first M of each count, a single network counts M times.
        originals: those that were learned from, which are also a kind: M of them, evenly spaced.
        held_out: originals that nothing was learned from; M of them, evenly spaced.

    Returns:
        By kind, ``original`` and ``held_out`` among them: ``one_nna``, ``coverage``, ``matching_distance`` (mean
        distance of a held-out network to the nearest of the kind), ``nearest_training`` (median distance to the nearest
        training original); None where there are fewer than two originals, held-out originals or networks of a kind.
    """
    num = min(len(originals), len(held_out), *(len(each) for each in sets.values() if len(each) > 1))
    if num < 2:
        return None
    training, reference = function_vectors(originals), function_vectors(evenly(held_out, num))
    within = distances(reference, reference)
    kinds = {"original": evenly(originals, num)}
    kinds |= {name: each.expand(num, -1, -1) if len(each) == 1 else each[:num] for name, each in sets.items()}
    found = {name: _scores(function_vectors(each), reference, within, training) for name, each in kinds.items()}
    return found | {"held_out": {"nearest_training": distances(reference, training).amin(1).median().item()}}


def evenly(members: Tensor, num: int) -> Tensor:
    """``num`` of them, evenly spaced."""
    return members[torch.linspace(0, len(members) - 1, num).round().long()]


def _scores(vectors: Tensor, held_out: Tensor, within: Tensor, training: Tensor) -> dict[str, float]:
    between = distances(vectors, held_out)
    return {
        "one_nna": nearest_neighbour_accuracy(distances(vectors, vectors), within, between),
        "coverage": coverage(between),
        "matching_distance": minimum_matching_distance(between),
        "nearest_training": distances(vectors, training).amin(1).median().item(),
    }


def function_vectors(probabilities: Tensor) -> Tensor:
    """``[num, images, classes]`` as vectors whose distance is a root mean square over the images."""
    return probabilities.flatten(1) / probabilities.shape[1] ** 0.5


def error_iou(first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
    """Intersection over union of the images that two networks get wrong, for every pair.

    Only *which* images are wrong counts, as in the paper, not what the wrong answers are. Two networks without any
    error have identical (empty) sets of them: their similarity is 1.

    Args:
        first: predictions [A, images].
        second: predictions [B, images].
        labels: [images].

    Returns:
        float64 [A, B] in 0 … 1.
    """
    wrong_first, wrong_second = (first != labels).double(), (second != labels).double()
    intersection = wrong_first @ wrong_second.T
    union = wrong_first.sum(1)[:, None] + wrong_second.sum(1)[None, :] - intersection
    return (intersection / union.clamp(min=1)).masked_fill(union == 0, 1.0)


def max_similarity(predictions: Tensor, originals: Tensor, labels: Tensor) -> Tensor:
    """Each network's greatest error IoU with any original: [num, images], [K, images], [images] → float64 [num].

    High means that the network is, in its behaviour, a copy of a training checkpoint.
    """
    return error_iou(predictions, originals, labels).amax(1)


def max_similarity_among(originals: Tensor, labels: Tensor) -> Tensor:
    """Each original's greatest error IoU with any *other* original: [K, images], [images] → float64 [K].

    A lone original has no other: its similarity is 0.
    """
    similarity = error_iou(originals, originals, labels)
    similarity.fill_diagonal_(0.0)
    return similarity.amax(1)

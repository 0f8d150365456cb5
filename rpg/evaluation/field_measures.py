"""Measures of generated data in function space: of what fields show, not of their weights.

Every datum is one vector, the values of a field on a grid. Reference data were learned from by nobody. M data of a set,
N reference data, F values of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from rpg.evaluation.novelty import distances
from rpg.evaluation.two_sample import coverage, minimum_matching_distance, nearest_neighbour_accuracy
from rpg.models.kernel_regression import square_root

NEIGHBOURS = 3
"""k of precision and recall, as in arXiv 1904.06991."""

Distances = Callable[[Tensor, Tensor], Tensor]
"""Data ``[A, F]`` and ``[B, F]`` → the distance of every pair, ``[A, B]``."""

Features = Callable[[Tensor], Tensor]
"""Data ``[M, F]`` as features of a classifier ``[M, K]``."""


def overlap_distances(first: Tensor, second: Tensor) -> Tensor:
    """1 - intersection over union of every pair of solid shapes, occupancies ``[A, F]`` and ``[B, F]`` of 0 and 1.

    Two empty shapes are equal.
    """
    both = first @ second.T
    either = first.sum(1)[:, None] + second.sum(1) - both
    return 1 - torch.where(either > 0, both / either.clamp(min=1), 1.0)


DISTANCES: dict[int, Distances] = {2: distances, 3: overlap_distances}
"""Between images (of brightness) and between solid shapes (of occupancy), by the dimensions of their grids."""


def shown_by(values: Tensor) -> Tensor:
    """What is compared of data on a grid ``[n, C, *grid]``, as vectors: brightness, or of shapes the occupancy."""
    return (values.flatten(1) > 0).float() if values.dim() == 5 else values.flatten(1)


def measure_samples(
    samples: Sequence[Tensor],
    held_out: Tensor,
    training: Tensor,
    features: Features | None,
    distances: Distances = distances,
) -> dict:
    """Every measure of some sets of one kind, each ``[M, F]``, as the mean over the sets.

    Args:
        samples: sets of M = N data.
        held_out: the reference, ``[N, F]``.
        training: what was learned from, ``[T, F]``.
        features: of a classifier that saw none of them; without, there is no ``frechet``.
        distances: between data; Euclidean unless told.

    Returns:
        ``one_nna`` (0.5 where samples and held-out data cannot be told apart), ``coverage``, ``mmd`` (mean distance of
        a held-out datum to the nearest sample), ``precision``, ``recall``, ``frechet``, ``nearest`` (median distance
        of a sample to the nearest training datum: near 0 where training data are repeated).
    """
    within = distances(held_out, held_out)
    found = []
    for each in samples:
        own, between = distances(each, each), distances(each, held_out)
        found.append(
            {
                "one_nna": nearest_neighbour_accuracy(own, within, between),
                "coverage": coverage(between),
                "mmd": minimum_matching_distance(between),
                "precision": within_reach(between, within),
                "recall": within_reach(between.T, own),
                "nearest": distances(each, training).amin(1).median().item(),
            }
        )
        if features is not None:
            found[-1]["frechet"] = frechet_distance(features(each), features(held_out))
    return {name: sum(each[name] for each in found) / len(found) for name in found[0]}


def within_reach(between: Tensor, reference: Tensor) -> float:
    """Share of data that lie nearer to some reference datum than its own k-th neighbour (arXiv 1904.06991).

    Precision: samples among held-out data; recall: held-out data among samples.

    Args:
        between: distances ``[data, reference data]``.
        reference: distances among the reference data; with at least k + 1 of them.
    """
    neighbours = min(NEIGHBOURS, len(reference) - 1)
    reach = reference.sort(1).values[:, neighbours]  # the first is the datum itself
    return (between <= reach).any(1).double().mean().item()


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Squared Fréchet distance of the normal distributions fitted to two sets of features ``[·, K]`` (1706.08500)."""
    first, second = first.double(), second.double()
    covariances = [each.T.cov() for each in (first, second)]
    root = square_root(covariances[0])
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    mean = (first.mean(0) - second.mean(0)).square().sum()
    return (mean + covariances[0].trace() + covariances[1].trace() - 2 * cross).item()


PARTS = 8
"""Gaussians of a class's mixture."""


def _clusters(members: Tensor, rng: torch.Generator) -> Tensor:
    """The cluster of each of a class's members ``[n, P]``, ``[n]`` long."""
    seed = int(torch.randint(2**31 - 1, (), generator=rng))
    model = KMeans(min(PARTS, len(members)), n_init=4, random_state=seed)
    return torch.from_numpy(model.fit_predict(members.double().numpy())).long()


def trivial_weights(weights: Tensor, labels: Tensor, wanted: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
    """What takes no generator, of the training data of each wanted class.

    Args:
        weights: ``[T, P]``, flattened checkpoints.
        labels: their classes ``[T]``.
        wanted: a class for each to make, ``[M]``.
        rng: source of the draws.

    Returns:
        ``[M, P]`` by name: the class average, midpoints of two, per-coordinate and covariance Gaussian by class, and
        a mixture of such Gaussians, one for each of a class's `PARTS` clusters (k-means).
    """
    made: dict[str, list[Tensor]] = {
        name: [] for name in ("average", "midpoint", "coordinate_gaussian", "covariance_gaussian", "mixture")
    }
    clusters = {int(label): _clusters(weights[labels == label], rng) for label in wanted.unique()}
    for label in wanted.tolist():
        members = weights[labels == label]  # [n, P]
        mean = members.mean(0)
        pair = torch.randperm(len(members), generator=rng)[:2]
        noise = torch.randn(weights.shape[1], generator=rng)
        combination = torch.randn(len(members), generator=rng) / len(members) ** 0.5
        made["average"].append(mean)
        made["midpoint"].append(members[pair].mean(0))
        made["coordinate_gaussian"].append(mean + noise * members.std(0, unbiased=False))
        made["covariance_gaussian"].append(mean + combination @ (members - mean))
        own = clusters[label]
        part = members[own == own[torch.randint(len(own), (), generator=rng)]]  # a part by its share
        combination = torch.randn(len(part), generator=rng) / len(part) ** 0.5
        made["mixture"].append(part.mean(0) + combination @ (part - part.mean(0)))
    return {name: torch.stack(rows) for name, rows in made.items()}

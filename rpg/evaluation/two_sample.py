"""Sets of networks compared by what they compute: with held-out originals, as the answer to one request, within tasks.

Each network is one vector, its class probabilities on the same images. The measures of two sets are those of PointFlow
(arXiv 1906.12320, section 5.1), taken over for weights by HyperDiffusion (arXiv 2303.17015).
M networks of either kind or of each task, F numbers a network; T tasks, B examples of each, C bits, K classes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rpg.evaluation.report import Networks, networks, summarize
from rpg.models.kernel_regression import exact_distances
from rpg.tasks.base import ImageTaskFamily

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


NUM_BINS = 15
"""Bins of confidence for the calibration error, of equal width."""


def joint_score(log_probabilities: Tensor) -> Tensor:
    """-log of the mean over networks of the probability of *all* right answers together, an example: ``[T]``.

    It is proper for a set of networks that is drawn from a posterior: one that holds the right network scores about as
    well as that network does, whatever the others say, while averages of answers tell neither from the other.

    Args:
        log_probabilities: of the right answers, ``[T, M, B]``.
    """
    together = log_probabilities.double().sum(-1)  # [T, M]
    num, examples = log_probabilities.shape[1:]
    return (math.log(num) - together.logsumexp(1)) / examples


def calibration_error(probabilities: Tensor, targets: Tensor) -> float:
    """Expected calibration error in 0 … 1 (arXiv 1706.04599, equation 3): mean distance of confidence and accuracy.

    Args:
        probabilities: ``[N, K]``.
        targets: right classes ``[N]``.
    """
    confidence, answers = probabilities.double().max(-1)
    right = (answers == targets).double()
    bins = (confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    gaps = torch.zeros(NUM_BINS, dtype=torch.float64).index_add_(0, bins, confidence - right)
    return gaps.abs().sum().item() / len(targets)


def ensemble_metrics(probabilities: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Of the sets of T tasks, by name, ``[T]`` float64 each.

    ``joint`` is `joint_score`; ``accuracy`` and ``nll`` (an example's mean negative log-likelihood) are those of the
    average answer; ``network_accuracy`` is the mean of single networks', ``best_accuracy`` that of the best.

    Args:
        probabilities: of each network's answers, ``[T, M, B, K]``.
        targets: right classes ``[T, B]``.
    """
    tiny = torch.finfo(probabilities.dtype).tiny
    wanted = targets[:, None, :, None].expand(-1, probabilities.shape[1], -1, 1)
    right = probabilities.gather(-1, wanted).squeeze(-1).clamp(min=tiny).log()  # [T, M, B]
    averaged = probabilities.double().mean(1)  # [T, B, K]
    of_average = averaged.gather(-1, targets[..., None]).squeeze(-1).clamp(min=tiny).log()  # [T, B]
    each = (probabilities.argmax(-1) == targets[:, None]).double().mean(-1)  # [T, M]
    return {
        "joint": joint_score(right),
        "accuracy": (averaged.argmax(-1) == targets).double().mean(-1),
        "nll": -of_average.mean(-1),
        "network_accuracy": each.mean(1),
        "best_accuracy": each.amax(1),
    }


def sets_of_networks(
    probabilities: Tensor, targets: Tensor, sizes: Sequence[int] = (1,), seed: int = 0, **more: Any
) -> Networks:
    """A report's kind: the sets of all M networks task by task, and the first of them in sets of other ``sizes``.

    Args:
        probabilities: ``[T, M, B, K]``.
        targets: ``[T, B]``.
        sizes: of sets; those over M are left out.
    """
    num = probabilities.shape[1]
    joint: dict[str, dict[int, float]] = {}
    for size in sorted({min(size, num) for size in sizes} | {num}):
        part = probabilities[:, :size]
        for name, values in ensemble_metrics(part, targets).items():
            joint.setdefault(name, {})[size] = values.mean().item()
        ece = calibration_error(part.double().mean(1).flatten(0, 1), targets.flatten())
        joint.setdefault("ece", {})[size] = ece
    return networks(ensemble_metrics(probabilities, targets), seed=seed, joint=joint, **more)


def rows_of_tasks(bits: Tensor) -> Tensor | None:
    """The rows of each task that has several: ``[T·R, C]`` in any order → ``[T, R]``, or None if there is none.

    R is the least that a task has of those with two or more.
    """
    _, task, counts = bits.unique(dim=0, return_inverse=True, return_counts=True)
    several = (counts > 1).nonzero()[:, 0].tolist()
    if not several:
        return None
    least = int(counts[several].min())
    return torch.stack([(task == each).nonzero()[:least, 0] for each in several])


def measure_per_task(
    task: ImageTaskFamily, probabilities: Mapping[str, Tensor], bits: Tensor, split: str = "test", seed: int = 0
) -> dict[str, Any] | None:
    """Compare a task's networks with its originals.

    Args:
        probabilities: by method ``[N, B, 2]``, of networks aligned with ``bits``; ``original`` among them.
        bits: of each network's task, ``[N, C]``.

    Returns:
        ``num_tasks``, ``networks_per_task``, and of each of ``methods``, as means over tasks, ``error_iou`` (overlap
        of the wrong answers of two networks for one task), ``accuracy`` (its summary over all networks), and of all but
        originals the figures of `beside_originals`. None where no task has several originals.
    """
    rows = rows_of_tasks(bits)
    if rows is None:
        return None
    targets = task.targets(bits[rows[:, 0]], split)  # [T, B]
    originals = list(map(function_vectors, probabilities["original"][rows]))
    methods: dict[str, dict[str, Any]] = {}
    for name, each in probabilities.items():
        answers = each[rows].argmax(-1)  # [T, R, B]
        overlaps = torch.stack([_mean_overlap(own, right) for own, right in zip(answers, targets, strict=True)])
        accuracies = (answers == targets[:, None]).double().mean(-1)  # [T, R]
        made = map(function_vectors, each[rows])
        found = [beside_originals(*pair) for pair in zip(made, originals, strict=True)]
        methods[name] = {
            "error_iou": overlaps.mean().item(),
            "accuracy": summarize(accuracies.flatten(), seed).model_dump(mode="json"),
            **{key: None if name == "original" else statistics.fmean(f[key] for f in found) for key in found[0]},
        }
    return {"num_tasks": len(rows), "networks_per_task": rows.shape[1], "methods": methods}


def scores_of_sets(
    task: ImageTaskFamily, probabilities: Mapping[str, Tensor], bits: Tensor, split: str = "test"
) -> dict[str, dict[str, dict[int, float]]]:
    """How well a task's networks answer together: by method, `Networks.joint` of sets of one and of all R.

    The arguments are those of `measure_per_task`; where no task has several originals, R is 1.
    """
    rows = rows_of_tasks(bits)
    rows = torch.arange(len(bits))[:, None] if rows is None else rows
    targets = task.targets(bits[rows[:, 0]], split)  # [T, B]
    return {name: sets_of_networks(each[rows], targets).joint for name, each in probabilities.items()}


def beside_originals(made: Tensor, originals: Tensor) -> dict[str, float]:
    """How vectors ``[R, F]`` of a task's networks lie beside those of its originals ``[R, F]``.

    ``nearest_neighbour_accuracy`` (1-NNA; 0.5 is perfect), ``coverage`` (share of the originals that are the nearest of
    one of the networks) and ``nearest`` (mean distance to the nearest original), all in class probabilities.
    """
    between, own, theirs = distances(made, originals), distances(made, made), distances(originals, originals)
    return {
        "nearest_neighbour_accuracy": nearest_neighbour_accuracy(own, theirs, between),
        "coverage": coverage(between),
        "nearest": between.amin(1).mean().item(),
    }


def _mean_overlap(answers: Tensor, targets: Tensor) -> Tensor:
    """Mean error IoU of two different networks of one task: ``[R, B]``, ``[B]``."""
    overlap = error_iou(answers, answers, targets)
    num = len(answers)
    return (overlap.sum() - overlap.diagonal().sum()) / (num * (num - 1))

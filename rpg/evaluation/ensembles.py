"""Several networks that answer one request: scores of the set, and of the average of their answers.

T tasks, M networks of each, B examples of each, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rpg.evaluation.report import Networks, networks

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
        seed: of the bootstrap over tasks.
        more: further fields of `Networks`.
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

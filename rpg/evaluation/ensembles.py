"""Several networks that answer one request: scores of the set, and of the average of their answers.

T tasks, M networks of each, B examples of each, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rpg.evaluation.metrics import Summary, summarize
from rpg.section import Section

NUM_BINS = 15
"""Bins of confidence for the calibration error, of equal width."""


class EnsembleScores(Section):
    """What a set of networks answers, summarised over tasks."""

    networks: int
    joint: Summary
    accuracy: Summary
    nll: Summary
    ece: float
    mean_of_networks: Summary
    best_of_networks: Summary


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


def score_ensembles(probabilities: Tensor, targets: Tensor, seed: int = 0) -> EnsembleScores:
    """Score the sets of T tasks.

    Args:
        probabilities: of each network's answers, ``[T, M, B, K]``.
        targets: right classes ``[T, B]``.
        seed: of the bootstrap over tasks.
    """
    num = probabilities.shape[1]
    tiny = torch.finfo(probabilities.dtype).tiny
    wanted = targets[:, None, :, None].expand(-1, num, -1, 1)
    right = probabilities.gather(-1, wanted).squeeze(-1).clamp(min=tiny).log()  # [T, M, B]
    averaged = probabilities.double().mean(1)  # [T, B, K]
    of_average = averaged.gather(-1, targets[..., None]).squeeze(-1).clamp(min=tiny).log()  # [T, B]
    each = (probabilities.argmax(-1) == targets[:, None]).double().mean(-1)  # [T, M]
    return EnsembleScores(
        networks=num,
        joint=summarize(joint_score(right), seed),
        accuracy=summarize((averaged.argmax(-1) == targets).double().mean(-1), seed),
        nll=summarize(-of_average.mean(-1), seed),
        ece=calibration_error(averaged.flatten(0, 1), targets.flatten()),
        mean_of_networks=summarize(each.mean(1), seed),
        best_of_networks=summarize(each.amax(1), seed),
    )

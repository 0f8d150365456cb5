"""Measures of networks of a wished loss: is what was asked for what came, and does it go on from its start?

T networks, P values of a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor


def asked_and_got(asked: Tensor, metrics: Mapping[str, Tensor]) -> dict[str, Any]:
    """How networks' losses follow what was asked for.

    Args:
        asked: losses ``[T]``.
        metrics: what was measured ``[T]``: ``loss`` on training images, ``test_loss`` and ``test_accuracy``.

    Returns:
        ``spearman`` (rank correlation of asked and got), ``factor`` (the median of the larger by the smaller), both on
        training images; ``test_spearman``; ``by_asked``: of every asked loss the means.
    """
    got, values = metrics["loss"], asked.unique()
    found: dict[str, Any] = {
        "spearman": rank_correlation(asked, got),
        "test_spearman": rank_correlation(asked, metrics["test_loss"]),
        "factor": (asked.log() - got.log()).abs().median().exp().item(),
    }
    rows = [asked == value for value in values]
    found["by_asked"] = {"asked": values.tolist()} | {
        name: [each[row].double().mean().item() for row in rows] for name, each in metrics.items()
    }
    return found


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's, of ``[T]`` and ``[T]``; 0 where one of them is constant."""
    if len(first.unique()) == 1 or len(second.unique()) == 1:
        return 0.0
    return float(spearmanr(first.numpy(), second.numpy()).statistic)


def direction(made: Tensor, trained: Tensor, starts: Tensor) -> dict[str, float]:
    """How like training what was made is: the mean cosine of both differences from the start.

    Args:
        made, trained: values ``[T, P]`` of networks that were made of the starts, and of those that training made.
        starts: ``[T, P]``.

    Returns:
        ``own_run``: with the start's own run; ``other_run``: with another's, which tells nothing of the start.
    """
    changed, wanted = made - starts, trained - starts

    def cosine(other: Tensor) -> float:
        return torch.cosine_similarity(changed, other, dim=1).mean().item()

    return {"own_run": cosine(wanted), "other_run": cosine(wanted.roll(1, 0))}

"""Similarity of two networks as the overlap of their errors (p-diff, arXiv 2402.13144, equation 7)."""

from __future__ import annotations

from torch import Tensor


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

"""Which weights of a pruned tensor live: a mask cut from scores at a wished share."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenization.errors import InputError


def cut_mask(scores: Tensor, sparsity: float) -> Tensor:
    """The mask of the highest scores.

    Args:
        scores: of any shape; the higher, the sooner a weight lives. Ties go to the earlier place.
        sparsity: share of weights that are zero, 0 … 1; their number is rounded to the nearest whole one.

    Returns:
        bool, of the shape of ``scores``: whether each weight lives.

    Raises:
        InputError: the share is not in 0 … 1.
    """
    if not 0 <= sparsity <= 1:
        raise InputError(f"sparsity is {sparsity}, but it is a share of zeros; give one of 0 to 1")
    alive = scores.numel() - round(sparsity * scores.numel())
    mask = torch.zeros_like(scores, dtype=torch.bool).flatten()
    mask[scores.flatten().argsort(descending=True, stable=True)[:alive]] = True
    return mask.view_as(scores)

"""Which weights of pruned tensors live: masks cut from scores, and how many live in each tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenization.errors import InputError

SUFFIXES: dict[str, tuple[str, ...]] = {
    "mask": ("_orig", "_mask"),
    "zeros": ("",),
    "csr": ("_crow_indices", "_col_indices", "_values", "_shape"),
    "int8": ("", "_scale"),
    "int4": ("_packed", "_scale", "_shape"),
}
"""What a weight's name is followed by in the names of what is stored of it."""


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


def share_out(total: int, shares: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """``total`` living weights among tensors, in proportion to their shares, none above its size.

    Args:
        total: 0 … the sum of ``sizes``.
        shares: of each tensor, above 0; what does not fit into one goes to the others.
        sizes: values of each tensor.

    Returns:
        whole numbers that sum to ``total``; largest remainders are rounded up.
    """
    weights, room = (torch.tensor(each, dtype=torch.float64) for each in (shares, sizes))
    counts = torch.zeros_like(room)
    for _ in sizes:
        open_shares = torch.where(counts < room, weights, 0.0)
        counts += open_shares / open_shares.sum().clamp(min=1e-300) * (total - counts.sum())
        counts = counts.minimum(room)
    whole = (counts + 1e-9).floor()
    order = (counts - whole).argsort(descending=True, stable=True)
    whole[order[: total - int(whole.sum())]] += 1
    return [int(count) for count in whole.tolist()]

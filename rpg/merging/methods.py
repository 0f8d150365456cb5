"""The methods that mergekit made common, each tensor by itself: n networks become one.

Linear (arXiv 2203.05482), SLERP of two, TIES (arXiv 2306.01708), DARE with and without TIES' signs (arXiv 2311.03099)
and Model Stock (arXiv 2403.19522). By formula: mergekit would bring datasets, pandas and more, and its functions of
plain tensors are no interface that it keeps. Where it is installed, a test compares.

V values of a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

METHODS = ("linear", "slerp", "ties", "dare_linear", "dare_ties", "model_stock")

NEED_BASE = ("ties", "dare_linear", "dare_ties", "model_stock")
"""Those that merge deviations from what all networks began with."""

COMBINATIONS = ("linear", "slerp", "model_stock")
"""Those whose result is a weighted sum of the networks (of their deviations), so that a product stays one."""

NORMALIZED = {"linear": True, "ties": True, "dare_linear": False, "dare_ties": False}
"""Whether weights are scaled to add up to 1, as mergekit does unless told otherwise."""

DENSITY = {"ties": 0.2, "dare_linear": 0.5, "dare_ties": 0.5}
"""Share of the deviations that are kept: that of the TIES paper, and that of mergekit's examples."""

PARALLEL = 0.9995
"""Cosine from which on two tensors are taken as parallel, between which SLERP is a straight line."""


def merge_values(
    method: str,
    values: Tensor,
    base: Tensor | None,
    weights: Tensor,
    generator: torch.Generator | None = None,
    *,
    density: float | None = None,
    normalize: bool = True,
) -> Tensor:
    """One tensor of a merged network.

    Args:
        method: one of `METHODS`.
        values: of the networks, ``[n, V]``, n at least 2.
        base: of what all of them began with, or stands for that, ``[V]``; None for zeros. Only `NEED_BASE` look at it.
        weights: of the networks, ``[n]``: of SLERP the place between the two that weigh most; Model Stock has none.
        generator: of what DARE leaves out.
        density: share of the deviations that TIES and DARE keep; None for `DENSITY`.
        normalize: whether weights are scaled to add up to 1; where signs disagree, those that count.
    """
    weights = weights.to(values.dtype)
    if method in ("linear", "slerp"):
        gram = values @ values.T if method == "slerp" else weights  # which linear does not look at
        return combination(method, gram, weights, normalize) @ values
    deltas = values if base is None else values - base
    if method == "model_stock":
        made = combination(method, deltas @ deltas.T, weights) @ deltas
        return made if base is None else base + made
    density = DENSITY[method] if density is None else density
    deltas = deltas.clone() if base is None else deltas  # changed in place: networks are large, and values the caller's
    if method == "ties":
        kept = max(1, int(density * deltas.shape[1]))
        for row in deltas:
            sizes = row.abs()
            row.masked_fill_(sizes < sizes.kthvalue(len(row) - kept + 1).values, 0)
    else:
        deltas.mul_(torch.rand(deltas.shape, generator=generator) < density).div_(density)
    if normalize:
        weights = weights / weights.sum()
    weighted = deltas.mul_(weights[:, None])
    if method == "dare_linear":
        made = weighted.sum(0)
    else:
        agree = torch.where(weighted.sum(0) >= 0, weighted > 0, weighted < 0)
        made = weighted.mul_(agree).sum(0)
        if normalize:
            share = torch.zeros_like(made)
            for weight, each in zip(weights.tolist(), agree, strict=True):
                share.add_(each, alpha=weight)
            made = made / share.where(share > 0, 1.0)
    return made if base is None else base + made


def combination(method: str, gram: Tensor, weights: Tensor, normalize: bool = True) -> Tensor:
    """What networks are multiplied by in their merged sum, ``[n]``, found from their inner products alone.

    Args:
        method: one of `COMBINATIONS`.
        gram: inner products of the networks, of Model Stock those of their deviations from the base, ``[n, n]``.
        weights, normalize: as `merge_values` takes them.
    """
    if method == "model_stock":
        return torch.full_like(weights, 1 / len(weights)) * stock_ratio(gram)
    if method == "linear":
        return weights / weights.sum() if normalize else weights
    first, second = weights.topk(2).indices.tolist() if len(weights) > 2 else (0, 1)
    place = weights[second] / (weights[first] + weights[second])
    norms = (gram[first, first] * gram[second, second]).sqrt()
    cosine = (gram[first, second] / norms).clamp(-1, 1) if norms > 0 else torch.ones_like(norms)
    made = torch.zeros_like(weights)
    if abs(cosine) > PARALLEL:
        made[first], made[second] = 1 - place, place
    else:
        angle = torch.acos(cosine)
        made[first], made[second] = torch.sin((1 - place) * angle), torch.sin(place * angle)
        made = made / torch.sin(angle)
    return made


def stock_ratio(gram: Tensor) -> Tensor:
    """How far Model Stock goes from the base to the mean: ``k cos θ / (1 + (k - 1) cos θ)``, its equation 5.

    θ is the mean angle between the k deviations, whose inner products are ``gram`` ``[k, k]``. The method expects it
    between 0 and 90 degrees, so that the point lies between base and mean; deviations that point apart have nothing in
    common, and the base remains.
    """
    norms = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
    cosines, num = gram / norms / norms[:, None], len(gram)
    cosine = ((cosines.sum() - cosines.diagonal().sum()) / (num * (num - 1))).clamp(0, 1)
    return num * cosine / (1 + (num - 1) * cosine)

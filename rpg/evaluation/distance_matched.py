"""Trivial baselines brought to the distance from the zoo at which the generated networks lie.

Noise that is as small as one likes is as good as one likes, so that a baseline says something only at the distance of
what it is compared with. Each family here is a line base + s · deviation with one strength s for all its networks.

K originals, N networks, V values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rpg.evaluation.novelty import distances, gram, leading_directions
from rpg.evaluation.vectors import StateDict, VectorSpace

LOW_RANK = 0.99
"""The share of the zoo's variance that the directions of the low-rank Gaussian hold."""

Family = tuple[Tensor, Tensor]
"""Bases and deviations of the networks, ``[N, V]`` each."""


def distance_matched_baselines(
    originals: Sequence[StateDict], runs: Sequence[int], num: int, distance: float, generator: torch.Generator
) -> dict[str, list[dict[str, Tensor]]]:
    """Networks of every family, their median distance to the nearest original as near to ``distance`` as it can be.

    Families: noise (relative to each layer), Gaussians with the zoo's variances, with their squares (which leave
    alone what hardly varies in the zoo), with its covariance and with its leading directions alone, the same within a
    random run, and extrapolation beyond pairs of a run.

    Args:
        originals: the zoo, at least two.
        runs: which run each is of, ``[K]``.
        num: N.
        distance: in units of the layers' standard deviations, as ``weight_vectors`` normalises.
        generator: source of the draws.
    """
    space = VectorSpace(originals)
    zoo = space.flatten(originals)
    scale = space.layer_scale(zoo)
    normalised = zoo / scale
    families = _families(zoo, torch.as_tensor(list(runs)), scale, num, generator)
    families["low_rank_gaussian"] = _low_rank(zoo, scale, num, generator)
    result = {}
    for name, (base, deviation) in families.items():
        strength = strength_for(base / scale, deviation / scale, normalised, distance)
        result[name] = space.unflatten(base + strength * deviation)
    return result


def strength_for(base: Tensor, deviation: Tensor, zoo: Tensor, distance: float) -> float:
    """The s for which base + s · deviation lies at ``distance`` from the zoo (median of the distance to the nearest).

    Args:
        base, deviation: ``[N, V]``.
        zoo: ``[K, V]``.
        distance: what is wanted; 0 is returned where even s = 0 lies farther.
    """
    # |base + s·deviation − original|² is a parabola in s for every pair, so that no network is made while searching.
    gap = (base[:, None] - zoo[None]) if base.numel() * len(zoo) < 1 << 24 else None
    if gap is not None:
        constant, linear = gap.double().square().sum(2), torch.einsum("nkv,nv->nk", gap, deviation).double()
    else:
        constant = distances(base, zoo).double().square()
        linear = (base * deviation).sum(1, dtype=torch.float64)[:, None] - (deviation @ zoo.T).double()
    square = deviation.double().square().sum(1)[:, None]

    def median(strength: float) -> float:
        squared = constant + 2 * strength * linear + strength**2 * square
        return squared.clamp(min=0).sqrt().amin(1).median().item()

    low, high = 0.0, 1.0
    if not distance > median(0.0):
        return 0.0
    while median(high) < distance and high < 1e6:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if median(middle) < distance else (low, middle)
    return high


def _families(zoo: Tensor, runs: Tensor, scale: Tensor, num: int, generator: torch.Generator) -> dict[str, Family]:
    count, size = zoo.shape
    mean = zoo.mean(0, dtype=torch.float64).float()
    chosen = torch.randint(count, (num,), generator=generator)
    families = {
        "noise": (zoo[chosen], scale * torch.randn(num, size, generator=generator)),
        "coordinate_gaussian": (mean.expand(num, -1), zoo.std(0) * torch.randn(num, size, generator=generator)),
        "sharpened_gaussian": (
            mean.expand(num, -1),
            zoo.var(0) / scale * torch.randn(num, size, generator=generator),
        ),
        "covariance_gaussian": (
            mean.expand(num, -1),
            torch.randn(num, count, generator=generator) @ (zoo - mean) / (count - 1) ** 0.5,
        ),
    }
    repeated = [run for run in runs.unique().tolist() if int((runs == run).sum()) > 1]
    if not repeated:
        return families
    if len(repeated) > 1:
        families |= _within_runs(zoo, runs, repeated, scale, num, generator)
    pairs = [_pair((runs == _pick(repeated, generator)).nonzero()[:, 0], generator) for _ in range(num)]
    first, second = (torch.stack([zoo[pair[i]] for pair in pairs]) for i in range(2))
    families["extrapolation"] = (first, second - first)
    return families


def _low_rank(zoo: Tensor, scale: Tensor, num: int, generator: torch.Generator) -> Family:
    """The zoo's covariance, cut to the leading directions of the normalised values."""
    mean = zoo.mean(0, dtype=torch.float64).float()
    directions = leading_directions(gram((zoo - mean) / scale), LOW_RANK).float()  # [K, k]
    weights = torch.randn(num, directions.shape[1], generator=generator) @ directions.T
    return mean.expand(num, -1), weights @ (zoo - mean) / (len(zoo) - 1) ** 0.5


def _within_runs(
    zoo: Tensor, runs: Tensor, choices: list[int], scale: Tensor, num: int, generator: torch.Generator
) -> dict[str, Family]:
    """Gaussians around the mean of a random run, with that run's variances, their squares, or its covariance."""
    bases: list[Tensor] = []
    deviations: dict[str, list[Tensor]] = {"coordinate": [], "sharpened": [], "covariance": []}
    for _ in range(num):
        rows = zoo[runs == _pick(choices, generator)]
        mean = rows.mean(0)
        noise = torch.randn(len(mean), generator=generator)
        bases.append(mean)
        deviations["coordinate"].append(rows.std(0) * noise)
        deviations["sharpened"].append(rows.var(0) / scale * noise)
        correlated = torch.randn(len(rows), generator=generator) @ (rows - mean)
        deviations["covariance"].append(correlated / (len(rows) - 1) ** 0.5)
    base = torch.stack(bases)
    return {f"run_{kind}_gaussian": (base, torch.stack(rows)) for kind, rows in deviations.items()}


def _pick(choices: list[int], generator: torch.Generator) -> int:
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def _pair(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:2]]

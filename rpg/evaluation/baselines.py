"""Trivial ways to make a new network from a zoo. A generator is worth its compute only if it beats them.

arXiv 2506.07998 finds that weight generators do not outperform noise and averages at making networks both new and
good. Each function here takes the zoo's state dicts and returns networks of their own: none shares memory with the zoo
or with another. Random draws take a ``torch.Generator`` on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rpg.evaluation.novelty import gram
from rpg.evaluation.vectors import StateDict, VectorSpace
from tokenization.errors import InputError


def average(state_dicts: Sequence[StateDict]) -> dict[str, Tensor]:
    """The average of all weights, which p-diff (arXiv 2402.13144) calls "ensemble" and others a uniform soup."""
    space = VectorSpace(state_dicts)
    return space.unflatten(_mean(space.flatten(state_dicts))[None])[0]


def add_noise(
    state_dicts: Sequence[StateDict], num: int, sigma: float, generator: torch.Generator, *, relative: bool = False
) -> list[dict[str, Tensor]]:
    """Random originals with Gaussian noise on every value (p-diff, section 4).

    Args:
        state_dicts: the zoo.
        num: networks to make; originals are drawn without repetition as long as there are any left.
        sigma: standard deviation of the noise, in units of the weights.
        generator: source of the draws.
        relative: ``sigma`` is in units of each layer's own standard deviation.
    """
    if sigma < 0:
        raise InputError(f"sigma is {sigma}; give at least 0")
    space = VectorSpace(state_dicts)
    vectors = space.flatten(state_dicts)
    scale = sigma * space.layer_scale(vectors) if relative else torch.full((space.size,), sigma)
    rounds = [torch.randperm(len(vectors), generator=generator) for _ in range(-(-num // len(vectors)))]
    chosen = vectors[torch.cat([*rounds, torch.empty(0, dtype=torch.long)])[:num]]
    return space.unflatten(chosen + scale * torch.randn(chosen.shape, generator=generator))


def average_random(
    state_dicts: Sequence[StateDict], num: int, generator: torch.Generator, *, k: int = 16
) -> list[dict[str, Tensor]]:
    """Averages of ``k`` different random originals each.

    Raises:
        InputError: the zoo has fewer than ``k`` networks.
    """
    if not 1 <= k <= len(state_dicts):
        raise InputError(f"k is {k}; give 1 to {len(state_dicts)}, the number of networks")
    space = VectorSpace(state_dicts)
    vectors = space.flatten(state_dicts)
    chosen = [torch.randperm(len(vectors), generator=generator)[:k] for _ in range(num)]
    return space.unflatten(torch.stack([_mean(vectors[rows]) for rows in chosen]) if num else vectors[:0])


def average_runs(state_dicts: Sequence[StateDict], runs: Sequence[int]) -> list[dict[str, Tensor]]:
    """The average of each training run, whose checkpoints share the order of their hidden units.

    Args:
        state_dicts: the zoo.
        runs: which run each is of.
    """
    space = VectorSpace(state_dicts)
    vectors = space.flatten(state_dicts)
    members = {run: [i for i, other in enumerate(runs) if other == run] for run in dict.fromkeys(runs)}
    return space.unflatten(torch.stack([_mean(vectors[rows]) for rows in members.values()]))


def interpolate(state_dicts: Sequence[StateDict], num: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Points on the straight lines between two different random originals, at uniformly random places.

    Raises:
        InputError: the zoo has fewer than two networks.
    """
    if len(state_dicts) < 2:
        raise InputError(f"interpolation needs at least 2 networks, not {len(state_dicts)}; add some to the zoo")
    space = VectorSpace(state_dicts)
    vectors = space.flatten(state_dicts)
    pairs = [torch.randperm(len(vectors), generator=generator)[:2].tolist() for _ in range(num)]
    places = torch.rand(num, generator=generator)
    points = [torch.lerp(vectors[a], vectors[b], place) for (a, b), place in zip(pairs, places, strict=True)]
    return space.unflatten(torch.stack(points) if num else vectors[:0])


def coordinate_gaussian(
    state_dicts: Sequence[StateDict], num: int, generator: torch.Generator
) -> list[dict[str, Tensor]]:
    """Every value drawn on its own from a Gaussian with the zoo's mean and variance of that value."""
    space = VectorSpace(state_dicts)
    vectors = space.flatten(state_dicts)
    noise = torch.randn(num, space.size, generator=generator)
    return space.unflatten(_mean(vectors) + _std(vectors) * noise)


def covariance_gaussian(
    state_dicts: Sequence[StateDict],
    num: int,
    generator: torch.Generator,
    *,
    rank: int | None = None,
    shrinkage: float = 0.0,
) -> list[dict[str, Tensor]]:
    """Networks drawn from a Gaussian with the zoo's mean and (low-rank, shrunk) covariance.

    The covariance S of K networks has rank K − 1 at most, and its eigenvectors come from the K × K Gram matrix, so
    that no matrix of values × values is ever made. What is drawn from is (1 − s)·S_rank + s·diag(S), with s the
    shrinkage towards independent values; ``rank=None`` keeps S whole.

    Args:
        state_dicts: the zoo.
        num: networks to make.
        generator: source of the draws.
        rank: how many principal directions of S to keep.
        shrinkage: s, from 0 (the zoo's covariance) to 1 (``coordinate_gaussian``).
    """
    if not 0 <= shrinkage <= 1:
        raise InputError(f"shrinkage is {shrinkage}; give 0 to 1")
    if rank is not None and rank < 1:
        raise InputError(f"rank is {rank}; give at least 1")
    space = VectorSpace(state_dicts)
    vectors = space.flatten(state_dicts)
    mean = _mean(vectors)
    deviations = vectors - mean
    directions = torch.linalg.eigh(gram(deviations)).eigenvectors.flip(1)[:, :rank].float()  # [K, rank], greatest first
    coefficients = torch.randn(num, directions.shape[1], generator=generator) @ directions.T
    correlated = coefficients @ deviations / max(len(vectors) - 1, 1) ** 0.5
    independent = _std(vectors) * torch.randn(num, space.size, generator=generator)
    return space.unflatten(mean + (1 - shrinkage) ** 0.5 * correlated + shrinkage**0.5 * independent)


def _mean(vectors: Tensor) -> Tensor:
    """Mean over the networks, [K, values] → [values], summed in float64: the spread of a zoo is a fine one."""
    return vectors.mean(0, dtype=torch.float64).float()


def _std(vectors: Tensor) -> Tensor:
    """Standard deviation over the networks, [K, values] → [values]; 0 for a single network."""
    return vectors.std(0) if len(vectors) > 1 else torch.zeros_like(vectors[0])

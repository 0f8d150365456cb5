"""Baselines of networks too large to be held together: each is a recipe, cooked from the memory-mapped checkpoints.

A recipe is the zoo's mean, plus a weighted sum of the checkpoints' deviations from it, plus independent noise. What
lies in the zoo's span needs no basis: a principal direction is a weighted sum of checkpoints, too. n checkpoints, N
networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rpg.evaluation.distance_matched import LOW_RANK, strength_for
from rpg.evaluation.novelty import leading_directions
from rpg.evaluation.results import AT_DISTANCE
from rpg.evaluation.span import ZooSpan
from rpg.evaluation.vectors import StateDict
from rpg.seeding import derive_seed, make_rng
from tokenization.errors import InputError

SPANNED = ("average_of_k", "interpolation", "covariance_gaussian", "low_rank_gaussian")
MATCHED = ("noise", "coordinate_gaussian", "covariance_gaussian", "low_rank_gaussian")
NAMES = ("noise", *SPANNED, "coordinate_gaussian", *(name + AT_DISTANCE for name in MATCHED))
"""What ``evaluate.baselines`` may name; the average is always there."""

AFFORDABLE = ("interpolation", "low_rank_gaussian", "low_rank_gaussian" + AT_DISTANCE)
"""The default for networks of more than `MANY_VALUES` values, where a network of each kind takes minutes to score."""

MANY_VALUES = 50_000_000

Cook = Callable[[], StateDict]
"""Makes a network when it is called, where that is no sum."""


@dataclass(frozen=True)
class Recipe:
    """One network.

    Attributes:
        weights: of the checkpoints' deviations, float64 ``[n]``.
        noise: standard deviation of the noise, in the ``unit``.
        unit: the standard deviation of each tensor's values, or of each value over the zoo.
        seed: of the noise.
    """

    weights: Tensor
    noise: float = 0.0
    unit: Literal["layer", "coordinate"] = "layer"
    seed: int = 0


def cook(zoo: ZooSpan, recipe: Recipe) -> StateDict:
    """The network of a recipe, in the stored dtypes; variances stay above the zoo's smallest."""
    first = zoo.checkpoints[0]
    stored: dict[str, Tensor] = {}
    for name in first.tensors:
        if name not in zoo.scales:
            stored[name] = first.tensor(name)
            continue
        rng = make_rng(recipe.seed, "noise", name)
        values = torch.empty(zoo.means[name].shape, dtype=first.info(name).dtype)
        for block, checkpoints in zoo.blocks(name):
            mean = zoo.means[name][block]
            made = mean + recipe.weights.float() @ (checkpoints - mean)
            if recipe.noise:
                unit = checkpoints.std(0) if recipe.unit == "coordinate" else zoo.spreads[name]
                made += recipe.noise * unit * torch.randn(made.shape, generator=rng)
            if name.endswith("running_var"):
                made.clamp_(min=float(checkpoints.min()))
            values[block] = made
        stored[name] = values.view(first.info(name).shape)
    return {name: stored[first.ties.get(name, name)] for name in first.order}


def recipes(zoo: ZooSpan, name: str, num: int, seed: int, *, sigma: float = 0.0, distance: float = 0.0) -> list[Recipe]:
    """``num`` networks of one kind.

    Args:
        zoo: at least two checkpoints.
        name: one of `NAMES`.
        num: N.
        seed: decides the draws.
        sigma: strength of ``noise``.
        distance: to the nearest checkpoint, of the kinds ``…_at_distance``, in normalised values.

    Raises:
        InputError: there is no such kind.
    """
    if name not in NAMES:
        known = ", ".join(NAMES)
        raise InputError(f"evaluate.baselines names {name!r}, which networks this large rule out; choose from {known}.")
    kind = name.removesuffix(AT_DISTANCE)
    rng = make_rng(seed, "recipes", kind)
    seeds = [derive_seed(seed, "recipe", kind, repr(sigma), number) for number in range(num)]
    count = len(zoo.checkpoints)
    if kind == "noise":
        strength = _noise_strength(zoo, distance) if name != kind else sigma
        rows = torch.randint(count, (num,), generator=rng)
        return [Recipe(_one(count, int(row)), strength, seed=each) for row, each in zip(rows, seeds, strict=True)]
    if kind == "coordinate_gaussian":
        strength = _coordinate_strength(zoo, distance) if name != kind else 1.0
        zeros = torch.zeros(count, dtype=torch.float64)
        return [Recipe(zeros, strength, "coordinate", each) for each in seeds]
    weights = _weights(zoo, kind, num, rng)
    if name != kind:
        # In axes of its span the zoo is n vectors of n numbers, whatever a network's size.
        zoo_vectors = zoo.coordinates()
        deviations = weights @ zoo_vectors
        weights = weights * strength_for(torch.zeros_like(deviations), deviations, zoo_vectors, distance)
    return [Recipe(each) for each in weights]


def _weights(zoo: ZooSpan, kind: str, num: int, rng: torch.Generator) -> Tensor:
    """Weights of the deviations, float64 ``[N, n]``."""
    count = len(zoo.checkpoints)
    if kind in ("covariance_gaussian", "low_rank_gaussian"):
        directions = leading_directions(zoo.gram, LOW_RANK if kind == "low_rank_gaussian" else 1.0)  # [n, k]
        coefficients = torch.randn(num, directions.shape[1], generator=rng, dtype=torch.float64)
        return coefficients @ directions.T / max(count - 1, 1) ** 0.5
    weights = torch.zeros(num, count, dtype=torch.float64)
    for row in weights:
        order = torch.randperm(count, generator=rng)
        if kind == "average_of_k":
            row[order[: min(16, count)]] = 1 / min(16, count)
        else:
            place = float(torch.rand((), generator=rng))
            row[order[:2]] = torch.tensor([1 - place, place], dtype=torch.float64)
    return weights


def _noise_strength(zoo: ZooSpan, distance: float) -> float:
    """Noise on an original stays nearest to it, and in many values its length is its expectation."""
    square = sum(len(zoo.means[name]) * (zoo.spreads[name] / zoo.scales[name]) ** 2 for name in zoo.scales)
    return distance / square**0.5


def _coordinate_strength(zoo: ZooSpan, distance: float) -> float:
    """Independent noise is at right angles to the zoo, and in many values its length is its expectation."""
    nearest = zoo.gram.diagonal().min().item()
    square = zoo.gram.trace().item() / max(len(zoo.checkpoints) - 1, 1)
    return (max(distance**2 - nearest, 0.0) / square) ** 0.5


def _one(count: int, row: int) -> Tensor:
    weights = torch.zeros(count, dtype=torch.float64)
    weights[row] = 1.0
    return weights

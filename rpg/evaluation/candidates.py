"""The networks that generated ones are compared with: every trivial baseline by name."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rpg.evaluation import baselines
from rpg.evaluation.distance_matched import comparable_baselines
from rpg.evaluation.novelty_curve import Distances
from rpg.evaluation.permutations import Group, permutation_groups
from rpg.evaluation.vectors import StateDict
from rpg.seeding import generator
from rpg.tasks import Task

AT_DISTANCE = "_at_distance"
"""Ends the names of baselines that lie as far from the zoo as the generated networks."""

STARTS = tuple(name + AT_DISTANCE for name in ("noise", "coordinate_gaussian", "run_coordinate_gaussian"))
"""Those that the control trains: the best places to start from, of each kind."""


def symmetries(task: Task) -> list[Group]:
    """Interchangeable hidden units of the target network; none are known for a task without images to trace it by."""
    images = getattr(task, "images", None)
    if images is None:
        return []
    with torch.random.fork_rng(devices=[]):
        return permutation_groups(task.build(), images("test")[:2])


def at_distance(
    measure: Distances, networks: Sequence[StateDict], num: int, seed: int
) -> dict[str, list[dict[str, Tensor]]]:
    """Baselines as far from the zoo as the generated networks, by name."""
    if len(measure.zoo) < 2:
        return {}
    distance = measure.plain(networks).amin(1).nanmedian().item()
    if not math.isfinite(distance):
        return {}
    stream = generator(seed, "comparable")
    made = comparable_baselines(measure.originals, measure.runs.tolist(), num, distance, stream)
    return {name + AT_DISTANCE: candidates for name, candidates in made.items()}


def trivial_networks(
    originals: Sequence[StateDict], runs: Sequence[int], num: int, seed: int
) -> dict[str, list[dict[str, Tensor]]]:
    """The baselines that need at least two originals, by name."""
    if len(originals) < 2:
        return {}
    k = min(16, len(originals))
    within: dict[str, list[dict[str, Tensor]]] = {}
    if len(set(runs)) > 1:
        within["run_average"] = baselines.average_runs(originals, runs)
    return within | {
        f"average_of_{k}": baselines.average_random(originals, num, generator(seed, "average"), k=k),
        "interpolation": baselines.interpolate(originals, num, generator(seed, "interpolation")),
        "coordinate_gaussian": baselines.coordinate_gaussian(originals, num, generator(seed, "coordinate")),
        "covariance_gaussian": baselines.covariance_gaussian(originals, num, generator(seed, "covariance")),
        "low_rank_gaussian": baselines.covariance_gaussian(
            originals, num, generator(seed, "low rank"), rank=min(16, k), shrinkage=0.1
        ),
    }

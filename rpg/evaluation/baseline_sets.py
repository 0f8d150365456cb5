"""Every trivial baseline by the name under which it is reported."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from rpg.evaluation import baselines
from rpg.evaluation.distance_matched import distance_matched_baselines
from rpg.evaluation.novelty_curve import Distances
from rpg.evaluation.results import AT_DISTANCE
from rpg.evaluation.vectors import StateDict
from rpg.seeding import make_rng

Sets = dict[str, list[dict[str, Tensor]]]
"""Networks by the name of their kind."""


def noisy_baselines(originals: Sequence[StateDict], sigmas: Sequence[float], num: int, seed: int) -> Sets:
    """Originals with noise of each strength, in units of each layer's standard deviation, in the order given."""
    return {
        f"noise_{sigma:g}": baselines.add_noise(originals, num, sigma, make_rng(seed, "noise", index), relative=True)
        for index, sigma in enumerate(sigmas)
    }


def baselines_of_several(originals: Sequence[StateDict], runs: Sequence[int], num: int, seed: int) -> Sets:
    """The baselines that need at least two originals, at distances of their own; none for a single one."""
    if len(originals) < 2:
        return {}
    k = min(16, len(originals))
    within = {"run_average": baselines.average_runs(originals, runs)} if len(set(runs)) > 1 else {}
    return within | {
        f"average_of_{k}": baselines.average_random(originals, num, make_rng(seed, "average"), k=k),
        "interpolation": baselines.interpolate(originals, num, make_rng(seed, "interpolation")),
        "coordinate_gaussian": baselines.coordinate_gaussian(originals, num, make_rng(seed, "coordinate")),
        "covariance_gaussian": baselines.covariance_gaussian(originals, num, make_rng(seed, "covariance")),
        "low_rank_gaussian": baselines.covariance_gaussian(
            originals, num, make_rng(seed, "low rank"), rank=min(16, k), shrinkage=0.1
        ),
    }


def baselines_at_distance(measure: Distances, networks: Sequence[StateDict], num: int, seed: int) -> Sets:
    """Baselines as far from the zoo as the generated networks; none where those are not finite."""
    if len(measure.zoo) < 2:
        return {}
    distance = measure.plain(networks).amin(1).nanmedian().item()
    if not math.isfinite(distance):
        return {}
    rng = make_rng(seed, "comparable")
    made = distance_matched_baselines(measure.originals, measure.runs.tolist(), num, distance, rng)
    return {name + AT_DISTANCE: networks for name, networks in made.items()}

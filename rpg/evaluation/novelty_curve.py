"""The share of networks that are both new and good, at growing distances from the zoo.

New: at least τ times as far from every original as the originals' own median distance to their nearest neighbour, after
hidden units have been matched. Good: at least as accurate as the zoo's median network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from rpg.evaluation.config import TAUS
from rpg.evaluation.metrics import accuracy, bootstrap_interval, summarize
from rpg.evaluation.novelty import distances
from rpg.evaluation.permutations import Group
from rpg.evaluation.rebasin import Matcher
from rpg.evaluation.results import NoveltyReport, SetNovelty
from rpg.evaluation.vectors import StateDict, VectorSpace

ROWS = 16
"""Matched networks that are held at a time."""


class Distances:
    """Distances of networks to the originals of a zoo, plain and after matching.

    Args:
        originals: the zoo.
        runs: which training run each is of. Checkpoints of a run keep the order of their units, so that a network is
            matched to one checkpoint of each run and the order found serves them all.
        groups: from ``permutation_groups``.
    """

    def __init__(self, originals: Sequence[StateDict], runs: Sequence[int], groups: Sequence[Group]) -> None:
        self.originals, self.runs = list(originals), torch.as_tensor(list(runs))
        self.space = VectorSpace(originals)
        vectors = self.space.flatten(originals)
        self.scale = self.space.layer_scale(vectors)
        self.zoo = vectors / self.scale
        scales = {slot.name: float(self.scale[slot.start]) for slot in self.space.slots}
        # a group counts only where what it permutes varies in the zoo
        self.groups = [group for group in groups if any(member.tensor in scales for member in group.members)]
        self.matcher = Matcher(self.groups, {**self._fixed_scales(), **scales})

    def _fixed_scales(self) -> dict[str, float]:
        """Tensors that no network changes weigh next to nothing: a unit order that only they contradict is free."""
        first = self.originals[0]
        return {m.tensor: 1e3 * float(first[m.tensor].abs().max() + 1e-12) for g in self.groups for m in g.members}

    def vectors(self, networks: Sequence[StateDict]) -> Tensor:
        """Normalised values ``[num, V]``."""
        return self.space.flatten(networks) / self.scale

    def plain(self, networks: Sequence[StateDict]) -> Tensor:
        """``[num, K]``."""
        return distances(self.vectors(networks), self.zoo)

    def matched(self, networks: Sequence[StateDict], plain: Tensor) -> Tensor:
        """``[num, K]``, never more than ``plain``."""
        if not self.groups:
            return plain
        result = plain.clone()
        finite = torch.isfinite(plain).all(1)
        runs = self.runs.unique().tolist()
        bounds = distances(self._sorted(self.vectors(networks)), self._sorted_zoo) if len(runs) > 1 else plain
        for run in runs:
            members = (self.runs == run).nonzero()[:, 0]
            zoo, wanted = self.zoo, finite
            if len(runs) > 1:  # leave out where no order of the units can bring it nearer than another original is
                zoo, wanted = zoo[members], finite & (bounds[:, members] < result.amin(1, keepdim=True)).any(1)
            for rows in wanted.nonzero()[:, 0].split(ROWS):
                aligned = self.matcher.match_all(self.originals[int(members[0])], [networks[int(i)] for i in rows])
                place = rows[:, None], members[None]
                result[place] = torch.minimum(result[place], distances(self.vectors(aligned), zoo))
        return result

    @cached_property
    def _sorted_zoo(self) -> Tensor:
        return self._sorted(self.zoo)

    def _sorted(self, vectors: Tensor) -> Tensor:
        """Every layer's values in ascending order: their distance is a lower bound for any permutation."""
        return torch.cat([vectors[:, slot.start : slot.stop].sort(1).values for slot in self.space.slots], 1)

    def unit(self) -> float:
        """Median distance of an original to its nearest neighbour, after matching."""
        chosen = torch.linspace(0, len(self.zoo) - 1, min(len(self.zoo), 64)).round().long().unique()
        networks = [self.originals[int(index)] for index in chosen]
        among = distances(self.zoo[chosen], self.zoo)
        among[torch.arange(len(chosen)), chosen] = float("inf")
        nearest = torch.stack([among[:, self.runs == run].amin(1) for run in self.runs.unique().tolist()]).T
        lonely = torch.tensor([int((self.runs == self.runs[int(i)]).sum()) == 1 for i in chosen])
        if bool(lonely.any()) and self.groups:  # runs of one checkpoint: their neighbours are of other runs
            plain = self.plain(networks)
            plain[torch.arange(len(chosen)), chosen] = 1e30
            return self.matched_without_self(networks, plain, chosen).amin(1).median().item()
        return nearest.amin(1).median().item()

    def matched_without_self(self, networks: Sequence[StateDict], plain: Tensor, own: Tensor) -> Tensor:
        """``matched`` of originals, their own place left out."""
        result = self.matched(networks, plain)
        result[torch.arange(len(own)), own] = float("inf")
        return result


def measure_novelty(
    sets: Mapping[str, Sequence[StateDict]],
    predictions: Mapping[str, Tensor],
    original_predictions: Tensor,
    labels: Tensor,
    measure: Distances,
    *,
    taus: Sequence[float] = TAUS,
    seed: int = 0,
) -> NoveltyReport | None:
    """Score every kind of networks.

    Args:
        sets: networks by kind.
        predictions: ``[num, images]`` by kind.
        original_predictions: ``[K, images]``.
        labels: ``[images]``.
        measure: the zoo.
        taus: distances in units of the zoo's median nearest-neighbour distance.
        seed: decides the bootstrap.

    Returns:
        None where the zoo has no spread to measure by.
    """
    if len(measure.zoo) < 2:
        return None
    unit = measure.unit()
    if not unit > 0:
        return None
    threshold = accuracy(original_predictions, labels).median().item()
    scored = {}
    for name, networks in sets.items():
        plain = measure.plain(networks)
        far = plain / unit, measure.matched(networks, plain) / unit
        scored[name] = score_novelty(*far, predictions[name], original_predictions, labels, taus=taus, seed=seed)
    return NoveltyReport(
        unit=unit, accuracy_threshold=threshold, groups=len(measure.groups), taus=tuple(taus), sets=scored
    )


def score_novelty(
    plain: Tensor,
    matched: Tensor,
    predictions: Tensor,
    original_predictions: Tensor,
    labels: Tensor,
    *,
    taus: Sequence[float],
    seed: int,
) -> SetNovelty:
    """Score one kind of networks.

    Args:
        plain, matched: distances to the originals before and after matching, in units, ``[num, K]``.
        predictions, original_predictions, labels, taus, seed: as in `measure_novelty`.
    """
    threshold = accuracy(original_predictions, labels).median().item()
    nearest = matched.nan_to_num(float("inf")).argmin(1)
    good = accuracy(predictions, labels) >= threshold - 1e-9
    near, far = _finite(plain.amin(1)), _finite(matched.amin(1))
    hits = torch.stack([good & (far >= tau) for tau in taus]).double()  # [taus, num]
    return SetNovelty(
        plain_distance=summarize(near, seed),
        matched_distance=summarize(far, seed),
        plain_distances=tuple(near.tolist()),
        matched_distances=tuple(far.tolist()),
        novel_and_performant=tuple(hits.mean(1).tolist()),
        ci95=tuple(bootstrap_interval(each, seed) for each in hits),
        disagreement=(predictions != original_predictions[nearest]).double().mean().item(),
        coverage=len(nearest.unique()) / plain.shape[1],
    )


def _finite(values: Tensor) -> Tensor:
    """A network with values that are not finite is nowhere: it counts as a copy."""
    return torch.where(torch.isfinite(values), values, torch.zeros_like(values)).double()

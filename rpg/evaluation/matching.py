"""Distances between networks whose hidden units have been matched (Git Re-Basin): a reordered copy is a copy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from rpg.evaluation.novelty import distances
from rpg.evaluation.permutations import Group
from rpg.evaluation.rebasin import Matcher
from rpg.evaluation.vectors import VectorSpace
from tokenization.checkpoint.structure import StateDict

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

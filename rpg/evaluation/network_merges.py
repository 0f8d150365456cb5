"""Merges of whole networks (`rpg.merging.parts`): what a user would try on a few checkpoints before any generator.

m merged networks, n of a zoo, V values of a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rpg.merging.parts import METHODS, merge_values
from rpg.seeding import make_rng
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.structure import StateDict

MERGES = tuple(f"merge_{method}" for method in METHODS)

AFFORDABLE_MERGES = ("merge_linear", "merge_ties")
"""Those of networks so large that each takes minutes."""

NUM_MERGED = 4
"""Networks that are merged into one."""

NUM_MADE = 12
"""Networks of a kind at most where they are drawn at random: merges of one run differ little."""


class Merges(Protocol):
    """Makes one network of a few of a zoo, by several methods."""

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods there are."""

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Shares of the zoo's networks in ``num`` merged ones, drawn at random: float64 ``[num, n]``."""

    def merge(self, method: str, shares: Tensor, seed: int = 0) -> StateDict:
        """The network that ``method`` makes of those with the largest shares."""


class NetworkMerges:
    """Merges checkpoints of one structure, a tensor at a time, read from their memory maps.

    Args:
        networks: n of them.
        runs: which run each is of; all of one when None.
        base: what all of them began with; the mean of the run that they are of when None.
    """

    def __init__(
        self, networks: Sequence[Checkpoint], runs: Sequence[int] | None = None, base: StateDict | None = None
    ) -> None:
        self.networks, self.base = list(networks), base
        self.runs = [0] * len(self.networks) if runs is None else list(runs)

    @property
    def methods(self) -> tuple[str, ...]:
        """`MERGES`; none of a single network."""
        return MERGES if len(self.networks) > 1 else ()

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Equal shares ``[num, n]`` of some networks of a random run."""
        return draw_shares(self.runs, min(num, NUM_MADE), generator)

    def merge(self, method: str, shares: Tensor, seed: int = 0, base: StateDict | None = None) -> StateDict:
        """One network, made by ``method`` of those with the largest positive shares, in the stored dtypes.

        Args:
            method: one of ``methods``.
            shares: of all networks, ``[n]``; those that count are scaled to add up to 1.
            seed: of what DARE leaves out.
            base: in place of that of all.
        """
        rows, weights = chosen_of(shares)
        base, first = base or self.base, self.networks[0]
        read = {0, *rows, *(_of_run(self.runs, rows[0]) if base is None else ())}
        stored: dict[str, Tensor] = {}
        for name, info in first.tensors.items():
            if not info.averaged:
                stored[name] = first.tensor(name)
                continue
            values = torch.stack([self.networks[row].flat(name).float() for row in rows])
            if len(rows) > 1:
                begun = base[name].flatten().float() if base is not None else self._mean(name, rows[0])
                made = merge_values(method.removeprefix("merge_"), values, begun, weights, make_rng(seed, name))
            else:
                made = values[0]
            if name.endswith("running_var"):
                made = made.clamp(min=values.min())
            stored[name] = made.to(info.dtype).view(info.shape)
            for row in read:
                self.networks[row].release(name)
        return {name: stored[first.ties.get(name, name)] for name in first.order}

    def _mean(self, name: str, row: int) -> Tensor:
        """The mean of a tensor over the run that a network is of."""
        members = _of_run(self.runs, row)
        total = torch.zeros(self.networks[0].flat(name).numel(), dtype=torch.float64)
        for member in members:
            total += self.networks[member].flat(name)
        return (total / len(members)).float()


def draw_shares(runs: Sequence[int], num: int, generator: torch.Generator) -> Tensor:
    """Equal shares of up to `NUM_MERGED` networks of a random run, of any where runs have one each: ``[num, n]``."""
    groups = [members for members in _groups(runs).values() if len(members) > 1] or [list(range(len(runs)))]
    shares = torch.zeros(num, len(runs), dtype=torch.float64)
    for row in shares:
        members = groups[int(torch.randint(len(groups), (), generator=generator))]
        order = torch.randperm(len(members), generator=generator)[:NUM_MERGED].tolist()
        row[[members[place] for place in order]] = 1 / len(order)
    return shares


def chosen_of(shares: Tensor) -> tuple[list[int], Tensor]:
    """The networks with the largest positive shares, and their weights, which add up to 1."""
    values, rows = shares.double().topk(min(NUM_MERGED, len(shares)))
    values = values.clamp(min=0)
    values = values / values.sum() if values.sum() > 0 else torch.full_like(values, 1 / len(values))
    return rows[values > 0].tolist(), values[values > 0]


def _groups(runs: Sequence[int]) -> Mapping[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for place, run in enumerate(runs):
        groups.setdefault(run, []).append(place)
    return groups


def _of_run(runs: Sequence[int], row: int) -> list[int]:
    """The networks of one's run; all of them where it is alone in its run."""
    members = _groups(runs)[runs[row]]
    return members if len(members) > 1 else list(range(len(runs)))

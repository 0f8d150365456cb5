"""Merging networks in memory: the arithmetic of every method, how a merge is described, and merges as baselines.

m merged networks, n of a zoo, V values of a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rpg.seeding import make_rng
from tokenization.checkpoint.checkpoint import Checkpoint, StateDict
from tokenization.errors import InputError

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


@dataclass(frozen=True)
class Merge:
    """How networks are merged.

    Attributes:
        method: one of `METHODS`.
        weights: one for each network, as given; equal ones when None.
        normalize: whether they are scaled to add up to 1; as is usual for the method when None.
        density: share of the deviations that TIES and DARE keep; the method's own when None.
        t: of SLERP, the place between the first (0) and the second network (1).
    """

    method: str
    weights: Sequence[float] | None = None
    normalize: bool | None = None
    density: float | None = None
    t: float | None = None
    seed: int = 0

    def settled(self, num: int) -> tuple[Tensor, dict[str, Any]]:
        """The weights of ``num`` networks, float64, and what `merge_values` takes besides.

        Raises:
            InputError: an option that the method does not have, or a value out of bounds.
        """
        if self.method not in METHODS:
            raise InputError(f"--method {self.method} is unknown; choose one of {', '.join(METHODS)}")
        if num < 2:
            raise InputError(f"a merge takes two networks or more, and there is {num}; name another")
        if self.method == "slerp" and num != 2:
            raise InputError(f"--method slerp is between two networks, and here are {num}; name two of them")
        for name, given, methods in (
            ("--density", self.density, tuple(DENSITY)),
            ("--t", self.t, ("slerp",)),
            ("--weights", self.weights, tuple(NORMALIZED)),
            ("--normalize", self.normalize, tuple(NORMALIZED)),
        ):
            if given is not None and self.method not in methods:
                raise InputError(f"{name} is for {', '.join(methods)}; leave it out of --method {self.method}")
        if self.density is not None and not 0 < self.density <= 1:
            raise InputError(f"--density {self.density} is not a share of the values; give more than 0, and 1 at most")
        if self.t is not None and not 0 <= self.t <= 1:
            raise InputError(f"--t {self.t} is not a place between two networks; give 0 (the first) to 1 (the second)")
        weights = torch.full((num,), 1 / num).double()
        if self.weights is not None:
            weights = torch.tensor(list(self.weights)).double()
        if self.method == "slerp":
            place = 0.5 if self.t is None else self.t
            weights = torch.tensor([1 - place, place]).double()
        normalize = NORMALIZED.get(self.method, True) if self.normalize is None else self.normalize
        if len(weights) != num or not weights.isfinite().all() or (normalize and abs(float(weights.sum())) < 1e-9):
            given_weights = ",".join(map(str, weights.tolist()))
            raise InputError(f"--weights {given_weights}: give {num} numbers, one for each network, whose sum is not 0")
        return weights, {"normalize": normalize, "density": self.density}

    def record(self) -> dict[str, Any]:
        """What the merged file says of it."""
        found: dict[str, Any] = {"method": self.method}
        if self.method in DENSITY:
            found["density"] = self.density or DENSITY[self.method]
        if self.method.startswith("dare"):
            found["seed"] = self.seed
        if self.method == "slerp":
            found["t"] = 0.5 if self.t is None else self.t
        return found

    @property
    def needs_base(self) -> bool:
        """Whether it merges deviations from what all networks began with."""
        return self.method in NEED_BASE


MERGES = tuple(f"merge_{method}" for method in METHODS)

AFFORDABLE_MERGES = ("merge_linear", "merge_ties")
"""Those of networks so large that each takes minutes."""

NUM_MERGED = 4
"""Networks that are merged into one."""

NUM_MADE = 12
"""Networks of a kind at most where they are drawn at random: merges of one run differ little."""


class NetworkMerges:
    """Merges checkpoints of one structure, a tensor at a time, read from their memory maps.

    Args:
        runs: which run each is of; all of one when None.
    """

    def __init__(self, networks: Sequence[Checkpoint], runs: Sequence[int] | None = None) -> None:
        self.networks = list(networks)
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
            shares: of all networks, ``[n]``; those that count are scaled to add up to 1.
            base: what they began with; the mean of the run that they are of when None.
        """
        rows, weights = chosen_of(shares)
        first = self.networks[0]
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

"""Hidden units matched between networks (Git Re-Basin, arXiv 2209.04836): matching, distances, whole zoos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rpg.evaluation.permutations import Group, symmetries
from rpg.evaluation.span import ZooSpan
from rpg.evaluation.two_sample import distances
from rpg.tasks import Task
from tokenization.checkpoint.structure import StateDict
from tokenization.errors import InputError
from tokenization.files import atomic_folder
from tokenization.zoo.locks import locks
from tokenization.zoo.manifest import require_new_folder
from tokenization.zoo.zoo import Zoo


def permute(state_dict: StateDict, groups: Sequence[Group], orders: Sequence[Tensor]) -> dict[str, Tensor]:
    """Put unit ``orders[g][i]`` of every group g in place i; the network computes what it did.

    Args:
        groups: from ``permutation_groups``.
        orders: a permutation ``[size]`` long for each group.
    """
    result = dict(state_dict)
    for group, order in zip(groups, orders, strict=True):
        for member in group.members:
            if member.tensor in result:
                index = (order[:, None] * member.repeat + torch.arange(member.repeat)).flatten()
                result[member.tensor] = result[member.tensor].index_select(member.axis, index)
    return result


class Matcher:
    """Matches networks to a reference.

    Args:
        groups: from ``permutation_groups``.
        scales: what each tensor is divided by first, so that no layer alone decides; 1 where not given.
        sweeps: how often every group is solved again at most.
    """

    def __init__(self, groups: Sequence[Group], scales: Mapping[str, float] | None = None, sweeps: int = 20) -> None:
        self.groups, self.sweeps = list(groups), sweeps
        self.scales = dict(scales or {})
        self.axes: dict[str, list[tuple[int, int, int]]] = {}  # tensor → (group, axis, repeat)
        for index, group in enumerate(self.groups):
            for member in group.members:
                self.axes.setdefault(member.tensor, []).append((index, member.axis, member.repeat))
        # a group that shares no tensor with another is solved for good the first time
        self.coupled = [any(len(self.axes[m.tensor]) > 1 for m in group.members) for group in self.groups]

    def orders(self, reference: StateDict, network: StateDict) -> list[Tensor]:
        """Orders that bring ``network`` nearest to ``reference``, by coordinate descent.

        Each group in turn is solved exactly as a linear assignment with the others held. The first sweep goes from the
        input on and uses only tensors whose other axes are solved already, so that a permuted copy of the reference
        itself is found whatever the permutation is.
        """
        return self._orders(self._scaled(reference), self._scaled(network))

    def match(self, reference: StateDict, network: StateDict) -> dict[str, Tensor]:
        """``network`` with its units in the order nearest to the reference's."""
        return self.match_all(reference, [network])[0]

    def match_all(self, reference: StateDict, networks: Sequence[StateDict]) -> list[dict[str, Tensor]]:
        """Each network with its units in the order nearest to the reference's."""
        left = self._scaled(reference)
        return [permute(each, self.groups, self._orders(left, self._scaled(each))) for each in networks]

    def _orders(self, left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> list[Tensor]:
        orders: list[np.ndarray | None] = [None] * len(self.groups)
        for sweep in range(self.sweeps):
            changed = False
            for index in range(len(self.groups)):
                before = orders[index]
                if before is not None and not self.coupled[index]:
                    continue
                gain = self._gain(left, right, index, orders)
                order = assignment(gain)
                changed |= before is None or _total(gain, order) > _total(gain, before) + 1e-9 * np.abs(gain).sum()
                orders[index] = order
            if sweep and not changed:
                break
        return [torch.from_numpy(np.asarray(order)) for order in orders]

    def _scaled(self, state_dict: StateDict) -> dict[str, np.ndarray]:
        return {name: state_dict[name].double().numpy() / self.scales.get(name, 1.0) for name in self.axes}

    def _gain(
        self,
        left: Mapping[str, np.ndarray],
        right: Mapping[str, np.ndarray],
        index: int,
        orders: Sequence[np.ndarray | None],
    ) -> np.ndarray:
        """How near the network's units ``[size, columns]`` are to the reference's ``[size, rows]``, over all weights.

        Half the squared distance, negative and less half the square of the reference's unit: ``a·b − b²/2``.
        """
        group = self.groups[index]
        gain = np.zeros((group.size, group.size))
        for member in group.members:
            others = [entry for entry in self.axes[member.tensor] if entry[0] != index]
            if any(orders[other] is None for other, _, _ in others):
                continue
            value = right[member.tensor]
            for other, axis, repeat in others:
                value = np.take(
                    value, (np.asarray(orders[other])[:, None] * repeat + np.arange(repeat)).ravel(), axis=axis
                )
            first = _units(left[member.tensor], member.axis, member.repeat)
            second = _units(value, member.axis, member.repeat)
            gain += first @ second.T - 0.5 * np.square(second).sum(1)
        return gain


def assignment(gain: np.ndarray) -> np.ndarray:
    """The column of each row, all different, that make the sum of ``gain`` ``[n, n]`` greatest.

    Where the best columns of all rows differ they are the answer, and the search, which takes n³, is not needed: so it
    is with networks that are near one another.
    """
    best = gain.argmax(1)
    if np.bincount(best, minlength=len(gain)).max(initial=0) <= 1:
        return best
    from scipy.optimize import linear_sum_assignment  # imported here: slow, and rarely needed

    return linear_sum_assignment(gain, maximize=True)[1]


def _total(gain: np.ndarray, order: np.ndarray) -> float:
    return float(gain[np.arange(len(order)), order].sum())


def _units(value: np.ndarray, axis: int, repeat: int) -> np.ndarray:
    """One row per unit: ``[size, …]``."""
    value = np.moveaxis(value, axis, 0)
    return value.reshape(value.shape[0] // repeat, -1)


RUN_SWEEPS = 4
"""How often every run is matched to the others' mean at most."""


def run_orders(measure: Distances) -> dict[int, list[Tensor]]:
    """The order of the hidden units of each run, ``[group]`` permutations each.

    The checkpoints of a run keep the order of their units, so that their mean stands for them. All runs are matched to
    the first, then in turn to the mean of the others (section 3.2's merging of several models) until nothing changes.

    Args:
        measure: the zoo, and its groups of interchangeable units.
    """
    span, matcher, orders = measure.span, measure.matcher, dict[int, list[Tensor]]()

    def mean(networks: Sequence[StateDict]) -> dict[str, Tensor]:
        return {name: torch.stack([each[name].double() for each in networks]).mean(0) for name in matcher.axes}

    centres = {run: mean([span.checkpoints[row].state_dict() for row in rows]) for run, rows in span.members.items()}
    reference = next(iter(centres.values()))
    for sweep in range(RUN_SWEEPS + 1):
        changed = False
        for run, centre in centres.items():
            if sweep and len(centres) > 1:
                others = {other: order for other, order in orders.items() if other != run}
                reference = mean([permute(centres[other], measure.groups, order) for other, order in others.items()])
            found = matcher.orders(reference, centre)
            same = run in orders and all(bool((a == b).all()) for a, b in zip(found, orders[run], strict=True))
            orders[run] = found
            changed |= not same
        if not changed:
            break
    return orders


@locks(lambda zoo, task, target: target, beside=True)
def align_zoo(zoo: Zoo, task: Task, target: Path | str) -> Zoo:
    """Write a zoo whose runs share one order of hidden units, all of it or none; every network computes what it did.

    Raises:
        InputError: there is something at ``target``, or nothing is known of the network's symmetries.
    """
    target = Path(target)
    require_new_folder(target)
    groups = symmetries(task)
    if not groups:
        raise InputError(
            f"nothing is known of the symmetries of the networks in {zoo.path}; align a zoo of a known network"
        )
    checkpoints = [zoo.checkpoint(index) for index in range(len(zoo))]
    measure = Distances(ZooSpan(checkpoints, None, [entry.run for entry in zoo.entries], "spread"), groups)
    orders = run_orders(measure)
    require_new_folder(target)
    with atomic_folder(target) as folder:
        aligned = Zoo.create(folder, task=zoo.task, condition=zoo.condition)
        for entry, original in zip(zoo.entries, checkpoints, strict=True):
            moved, run = permute(original.state_dict(), measure.groups, orders[entry.run]), entry.run
            aligned.append(
                moved, run=run, step=entry.step, condition=entry.condition, metrics=entry.metrics, split=entry.split
            )
    return Zoo.open(target)


ROWS = 16
"""Matched networks that are held at a time."""


class Distances:
    """Distances of networks to the originals of a zoo after matching.

    Checkpoints of a run keep the order of their units, so that a network is matched to one checkpoint of each run and
    the order found serves them all.

    Args:
        span: the zoo, in which values count by their layer's spread; one that is held, except for `run_orders`.
        groups: from ``permutation_groups``.
    """

    def __init__(self, span: ZooSpan, groups: Sequence[Group]) -> None:
        self.span = span
        # a group counts only where what it permutes varies in the zoo
        self.groups = [group for group in groups if any(member.tensor in span.scales for member in group.members)]
        # what no network changes weighs next to nothing: a unit order that only such tensors contradict is free
        first = span.checkpoints[0].load()
        fixed = {m.tensor: 1e3 * float(first[m.tensor].abs().max() + 1e-12) for g in self.groups for m in g.members}
        self.matcher = Matcher(self.groups, {**fixed, **span.scales})

    @cached_property
    def zoo(self) -> Tensor:
        """The originals' values over their layer's scale, ``[n, V]``."""
        return torch.cat([self.span.held[name] / scale for name, scale in self.span.scales.items()], 1)

    @cached_property
    def _references(self) -> list[StateDict]:
        """The first original of each run."""
        return [self.span.checkpoints[rows[0]].load() for rows in self.span.members.values()]

    def plain(self, networks: Sequence[StateDict]) -> Tensor:
        """Distances without matching, ``[N, n]``."""
        return distances(self.vectors(networks), self.zoo)

    def vectors(self, networks: Sequence[StateDict]) -> Tensor:
        """Networks' values over their layer's scale, ``[N, V]``; no mean is taken off: it has an order of its own."""
        scales = self.span.scales
        return torch.stack(
            [torch.cat([each[n].detach().flatten().float() / s for n, s in scales.items()]) for each in networks]
        )

    def matched(self, networks: Sequence[StateDict], plain: Tensor, own: Sequence[int] = ()) -> Tensor:
        """``[N, n]``, never more than ``plain``; with ``own``, the original that each network is, not to that one."""
        if not self.groups:
            return plain
        result, runs = plain.clone(), list(self.span.members.values())
        finite, itself = torch.isfinite(plain).all(1), (torch.arange(len(own)), torch.tensor(own, dtype=torch.long))
        if len(runs) > 1:
            bounds = distances(self._sorted(self.vectors(networks)), self._sorted_zoo)
            bounds[itself] = float("inf")
        for reference, members in zip(self._references, runs, strict=True):
            wanted = finite
            if len(runs) > 1:  # leave out where no order of the units can bring it nearer than another original is
                wanted = finite & (bounds[:, members] < result.amin(1, keepdim=True)).any(1)
            for rows in wanted.nonzero()[:, 0].split(ROWS) if bool(wanted.any()) else ():
                aligned = self.matcher.match_all(reference, [networks[int(i)] for i in rows])
                place = rows[:, None], torch.tensor(members)[None]
                result[place] = torch.minimum(result[place], distances(self.vectors(aligned), self.zoo[members]))
                result[itself] = plain[itself]
        return result

    @cached_property
    def _sorted_zoo(self) -> Tensor:
        return self._sorted(self.zoo)

    def _sorted(self, vectors: Tensor) -> Tensor:
        """Every layer's values in ascending order: their distance is a lower bound for any permutation."""
        sizes = [len(self.span.means[name]) for name in self.span.scales]
        return torch.cat([layer.sort(1).values for layer in vectors.split(sizes, 1)], 1)

    def unit(self) -> float:
        """Median distance of an original to its nearest neighbour, after matching."""
        chosen = torch.linspace(0, len(self.zoo) - 1, min(len(self.zoo), 64)).round().long().unique()
        own = torch.arange(len(chosen)), chosen
        among = distances(self.zoo[chosen], self.zoo)
        if any(len(members) == 1 for members in self.span.members.values()):  # their neighbours are of other runs
            among[own] = 1e30  # an infinite one would not be matched
            rows = chosen.tolist()
            among = self.matched([self.span.checkpoints[index].load() for index in rows], among, rows)
        among[own] = float("inf")
        return among.amin(1).median().item()

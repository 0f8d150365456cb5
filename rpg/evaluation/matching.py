"""Weight matching (Git Re-Basin, arXiv 2209.04836, section 3.2): give hidden units the order of another network's.

A network with its units in another order computes the same and is no new network, whatever the distance of its weights
says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rpg.evaluation.permutations import Group

StateDict = Mapping[str, Tensor]


def permute(state_dict: StateDict, groups: Sequence[Group], orders: Sequence[Tensor]) -> dict[str, Tensor]:
    """Put unit ``orders[g][i]`` of every group g in place i; the network computes what it did.

    Args:
        state_dict: a network.
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


def random_orders(groups: Sequence[Group], generator: torch.Generator) -> list[Tensor]:
    """A random order of the units of each group."""
    return [torch.randperm(group.size, generator=generator) for group in groups]


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

    def orders(self, reference: StateDict, network: StateDict) -> list[Tensor]:
        """Orders that bring ``network`` nearest to ``reference``, by coordinate descent.

        Each group in turn is solved exactly as a linear assignment with the others held. The first sweep goes from the
        input on and uses only tensors whose other axes are solved already, so that a permuted copy of the reference
        itself is found whatever the permutation is.
        """
        left, right = self._scaled(reference), self._scaled(network)
        orders: list[np.ndarray | None] = [None] * len(self.groups)
        for sweep in range(self.sweeps):
            changed = False
            for index, group in enumerate(self.groups):
                gain = self._gain(left, right, index, orders)
                order = linear_sum_assignment(gain, maximize=True)[1]
                before = orders[index]
                changed |= before is None or gain[np.arange(group.size), before].sum() < gain[
                    np.arange(group.size), order
                ].sum() * (1 - 1e-9)
                orders[index] = order
            if sweep and not changed:
                break
        return [torch.from_numpy(np.asarray(order)) for order in orders]

    def match(self, reference: StateDict, network: StateDict) -> dict[str, Tensor]:
        """``network`` with its units in the order nearest to the reference's."""
        return permute(network, self.groups, self.orders(reference, network))

    def _scaled(self, state_dict: StateDict) -> dict[str, np.ndarray]:
        return {name: state_dict[name].double().numpy() / self.scales.get(name, 1.0) for name in self.axes}

    def _gain(
        self,
        left: Mapping[str, np.ndarray],
        right: Mapping[str, np.ndarray],
        index: int,
        orders: Sequence[np.ndarray | None],
    ) -> np.ndarray:
        """Inner products ``[size, size]`` of the reference's units with the network's, over all their weights."""
        group = self.groups[index]
        gain = np.zeros((group.size, group.size))
        for member in group.members:
            others = [entry for entry in self.axes[member.tensor] if entry[0] != index]
            if any(orders[other] is None for other, _, _ in others):
                continue
            value = right[member.tensor]
            for other, axis, repeat in others:
                value = np.take(value, _expand(orders[other], repeat), axis=axis)  # type: ignore[arg-type]
            first = _units(left[member.tensor], member.axis, member.repeat)
            gain += first @ _units(value, member.axis, member.repeat).T
        return gain


def _expand(order: np.ndarray, repeat: int) -> np.ndarray:
    return (order[:, None] * repeat + np.arange(repeat)).ravel()


def _units(value: np.ndarray, axis: int, repeat: int) -> np.ndarray:
    """One row per unit: ``[size, …]``."""
    value = np.moveaxis(value, axis, 0)
    return value.reshape(value.shape[0] // repeat, -1)

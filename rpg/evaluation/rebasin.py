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
from tokenization.checkpoint.structure import StateDict


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
                value = np.take(value, _expand(orders[other], repeat), axis=axis)  # type: ignore[arg-type]
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
    return linear_sum_assignment(gain, maximize=True)[1]


def _total(gain: np.ndarray, order: np.ndarray) -> float:
    return float(gain[np.arange(len(order)), order].sum())


def _expand(order: np.ndarray, repeat: int) -> np.ndarray:
    return (order[:, None] * repeat + np.arange(repeat)).ravel()


def _units(value: np.ndarray, axis: int, repeat: int) -> np.ndarray:
    """One row per unit: ``[size, …]``."""
    value = np.moveaxis(value, axis, 0)
    return value.reshape(value.shape[0] // repeat, -1)

"""Networks of many tasks, in parts that fit into memory: of large networks no more than a few are held at once.

T networks or tasks, S seen ones, C condition values, V values of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from rpg.tasks.side_by_side import LARGE, Stacked, stack
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.structure import StateDict

PART_BYTES = 1 << 29
"""Networks of this many bytes in all, and one at least, are held at once."""

BLOCK = 1 << 15
"""Values of a tensor that are read of all networks at once."""

Parts = Iterable[Stacked]
"""Networks of one structure in the order of their tasks, some at a time."""


@dataclass(frozen=True)
class TaskNetworks:
    """One checkpoint for each of some tasks; values stay on disk until they are asked for.

    Attributes:
        bits: ``[T, C]``.
        checkpoints: T of one structure.
    """

    bits: Tensor
    checkpoints: Sequence[Checkpoint]

    @property
    def num_values(self) -> int:
        """Values of a network."""
        return sum(math.prod(info.shape) for info in self.checkpoints[0].tensors.values())

    @property
    def is_large(self) -> bool:
        """Whether one network fills the machine without company."""
        return self.num_values >= LARGE

    @cached_property
    def _all(self) -> Stacked:
        return stack([each.state_dict() for each in self.checkpoints])

    @property
    def part_size(self) -> int:
        """How many networks are held at once."""
        return max(1, PART_BYTES // max(1, sum(info.num_bytes for info in self.checkpoints[0].tensors.values())))

    @property
    def _in_memory(self) -> bool:
        return len(self.checkpoints) <= self.part_size

    def select(self, rows: Tensor | Sequence[int]) -> TaskNetworks:
        """Some of them, in the order of ``rows``."""
        chosen = torch.as_tensor(rows)
        return TaskNetworks(self.bits[chosen], [self.checkpoints[row] for row in chosen.tolist()])

    def join(self, other: TaskNetworks) -> TaskNetworks:
        """These and then others."""
        return TaskNetworks(torch.cat([self.bits, other.bits]), [*self.checkpoints, *other.checkpoints])

    def weights(self) -> Stacked:
        """All of them in memory, ``[T, *shape]``."""
        return self._all

    def parts(self, rows: Tensor | None = None) -> Iterator[Stacked]:
        """All of them, or those of ``rows``."""
        if self._in_memory:
            yield self._all if rows is None else {name: value[rows] for name, value in self._all.items()}
            return
        chosen = range(len(self.checkpoints)) if rows is None else rows.tolist()
        yield from in_parts(load(self.checkpoints[row]) for row in chosen)

    def mixed(self, mixture: Tensor) -> Iterator[Stacked]:
        """Networks that are weighted sums of these: shares ``[T', T]`` → T' networks; small ones in float64."""
        first, dtype = self.checkpoints[0], torch.float32 if self.is_large else torch.float64
        for shares in mixture.to(dtype).split(self.part_size):
            stored: Stacked = {}
            for name, info in first.tensors.items():
                if not info.averaged:
                    stored[name] = first.tensor(name).expand(len(shares), *info.shape)
                    continue
                made = [(shares @ block.to(dtype)).to(info.dtype) for block in self._blocks(name)]
                stored[name] = torch.cat(made, 1).view(len(shares), *info.shape)
            yield {name: stored[first.ties.get(name, name)] for name in first.order}

    def products(self, other: TaskNetworks) -> Tensor:
        """Inner products with other networks, ``[T, T']``, after the first of ``other`` has been taken off all."""
        total = torch.zeros(len(self.checkpoints), len(other.checkpoints), dtype=torch.float64)
        for name, info in self.checkpoints[0].tensors.items():
            if info.averaged:
                for own, others in zip(self._blocks(name), other._blocks(name), strict=True):
                    total += ((own - others[:1]).float() @ (others - others[:1]).float().T).double()
        return total

    def spread(self) -> float:
        """Root mean square deviation of a value from its mean over the networks."""
        total, count = 0.0, 0
        for name, info in self.checkpoints[0].tensors.items():
            if info.averaged:
                for block in self._blocks(name):
                    total += block.double().std(0).square().sum().item()
                    count += block.shape[1]
        return (total / count) ** 0.5

    def _blocks(self, name: str) -> Iterator[Tensor]:
        """The values of a tensor, of all networks: ``[T, at most BLOCK]`` each."""
        if self._in_memory:
            yield from self._all[name].flatten(1).split(BLOCK, 1)
            return
        total = math.prod(self.checkpoints[0].info(name).shape)
        for start in range(0, total, BLOCK):
            yield torch.stack([each.flat(name)[start : start + BLOCK] for each in self.checkpoints])
            for each in self.checkpoints:
                each.release(name, start, min(start + BLOCK, total))


def in_parts(networks: Iterable[StateDict]) -> Iterator[Stacked]:
    """Networks that come one after another, stacked some at a time."""
    source = iter(networks)
    for first in source:
        size = sum(value.nbytes for value in first.values())
        yield stack([first, *islice(source, max(0, PART_BYTES // max(1, size) - 1))])


def load(checkpoint: Checkpoint) -> StateDict:
    """A checkpoint in memory, and no page of its file any longer."""
    state_dict = checkpoint.state_dict()
    for name in checkpoint.tensors:
        checkpoint.release(name)
    return state_dict

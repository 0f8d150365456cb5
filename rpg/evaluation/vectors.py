"""State dicts as flat vectors of the values that vary, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenization.errors import InputError

StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in the flat vector."""

    name: str
    start: int
    stop: int


class VectorSpace:
    """The values that a zoo's networks differ in, as one float32 vector per network.

    Everything else is copied from the first network: integer tensors, single values, and tensors that are bit for
    bit the same in all networks (frozen layers, fixed buffers). Of tensors that share memory (tied weights) the first
    name holds the values and the others stay tied to it. With a single network nothing can be told constant, so that
    all its floating-point tensors vary.

    All networks are held in memory at once, which suits networks of up to some million values.

    Args:
        state_dicts: the zoo's networks, at least one, of one structure.
    """

    def __init__(self, state_dicts: Sequence[StateDict]) -> None:
        if not state_dicts:
            raise InputError("networks", "none", "at least one")
        self.first = state_dicts[0]
        self.ties = _ties(self.first)
        self.slots: list[Slot] = []
        self.floors: dict[str, float] = {}
        start = 0
        for name, tensor in self.first.items():
            if name in self.ties or not tensor.is_floating_point() or tensor.numel() < 2:
                continue
            if len(state_dicts) > 1 and all(torch.equal(tensor, other[name]) for other in state_dicts[1:]):
                continue
            self.slots.append(Slot(name, start, start + tensor.numel()))
            start = self.slots[-1].stop
            if name.endswith("running_var"):
                self.floors[name] = min(float(other[name].min()) for other in state_dicts)
        self.size = start

    def flatten(self, state_dicts: Sequence[StateDict]) -> Tensor:
        """Copy networks into float32 [num, values]."""
        vectors = torch.empty(len(state_dicts), self.size)
        for row, state_dict in zip(vectors, state_dicts, strict=True):
            for slot in self.slots:
                row[slot.start : slot.stop] = state_dict[slot.name].reshape(-1)
        return vectors

    def unflatten(self, vectors: Tensor) -> list[dict[str, Tensor]]:
        """Make networks of [num, values]; none shares memory with the zoo or with another.

        A batch-norm variance below the zoo's smallest is raised to it: a negative one would make the network NaN and
        a baseline look worse than its idea is.
        """
        return [self._network(vector) for vector in vectors]

    def _network(self, vector: Tensor) -> dict[str, Tensor]:
        values = {slot.name: vector[slot.start : slot.stop] for slot in self.slots}
        network: dict[str, Tensor] = {}
        for name, like in self.first.items():
            if name in self.ties:
                network[name] = network[self.ties[name]]
            elif name in values:
                value = values[name].clamp(min=self.floors[name]) if name in self.floors else values[name]
                network[name] = value.reshape(like.shape).to(like.dtype, copy=True)
            else:
                network[name] = like.detach().clone()
        return network

    def layer_scale(self, vectors: Tensor) -> Tensor:
        """Standard deviation of each layer's values over all networks, [num, values] → [values]; at least 1e-12."""
        scale = torch.empty(self.size)
        for slot in self.slots:
            scale[slot.start : slot.stop] = vectors[:, slot.start : slot.stop].std(correction=0)
        return scale.clamp(min=1e-12)


def _ties(state_dict: StateDict) -> dict[str, str]:
    """Names whose tensor is another's memory in the same shape: alias → the first name of it."""
    owners: dict[tuple, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in state_dict.items():
        if tensor.numel() == 0:
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if owners.setdefault(key, name) != name:
            ties[name] = owners[key]
    return ties

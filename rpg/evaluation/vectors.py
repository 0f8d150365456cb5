"""State dicts as flat vectors of the values that vary, and back."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenization.checkpoint.structure import StateDict
from tokenization.checkpoint.tensor_file import find_ties
from tokenization.errors import InputError


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in the flat vector."""

    name: str
    start: int
    stop: int


class FlatSpace:
    """Stacked weights of T networks as vectors ``[T, P]`` and back.

    Args:
        like: tensors ``[T, *shape]`` by name, for any T.

    Attributes:
        slots: where each tensor lies.
        size: P.
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self.shapes = {name: value.shape[1:] for name, value in like.items()}
        stops = itertools.accumulate(shape.numel() for shape in self.shapes.values())
        self.slots = [Slot(n, stop - s.numel(), stop) for (n, s), stop in zip(self.shapes.items(), stops, strict=True)]
        self.size = self.slots[-1].stop if self.slots else 0

    def flatten(self, weights: Mapping[str, Tensor]) -> Tensor:
        """``[T, P]``."""
        return torch.cat([weights[name].flatten(1) for name in self.shapes], 1)

    def unflatten(self, vectors: Tensor) -> dict[str, Tensor]:
        """Stacked weights that share the vectors' memory."""
        return {
            slot.name: vectors[:, slot.start : slot.stop].reshape(-1, *self.shapes[slot.name]) for slot in self.slots
        }


class VectorSpace:
    """The values that a zoo's networks differ in, as one float32 vector per network.

    Everything else is copied from the first network: integer tensors, single values, and tensors that are bit for
    bit the same in all networks (frozen layers, fixed buffers). Of tensors that share memory (tied weights) the first
    name holds the values and the others stay tied to it. With a single network nothing can be told constant, so that
    all its floating-point tensors vary.

    All networks are held in memory at once, which suits networks of up to some million values.
    """

    def __init__(self, state_dicts: Sequence[StateDict]) -> None:
        if not state_dicts:
            raise InputError("there are no networks to make vectors of; give at least one")
        self.first = state_dicts[0]
        self.ties = find_ties(self.first)
        varying = {
            name: tensor[None]
            for name, tensor in self.first.items()
            if name not in self.ties and tensor.is_floating_point() and tensor.numel() and tensor.isfinite().all()
            if len(state_dicts) == 1 or any(not torch.equal(tensor, other[name]) for other in state_dicts[1:])
        }
        self.flat = FlatSpace(varying)
        self.slots, self.size = self.flat.slots, self.flat.size
        self.floors = {
            name: min(float(other[name].min()) for other in state_dicts)
            for name in varying
            if name.endswith("running_var")
        }

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
        return [self._network(self.flat.unflatten(vector[None])) for vector in vectors]

    def _network(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        network: dict[str, Tensor] = {}
        for name, like in self.first.items():
            if name in self.ties:
                network[name] = network[self.ties[name]]
            elif name in values:
                value = values[name][0]
                value = value.clamp(min=self.floors[name]) if name in self.floors else value
                network[name] = value.to(like.dtype, copy=True)
            else:
                network[name] = like.detach().clone()
        return network

    def layer_scale(self, vectors: Tensor) -> Tensor:
        """Standard deviation of each layer's values over all networks, [num, values] → [values]; at least 1e-12."""
        scale = torch.empty(self.size)
        for slot in self.slots:
            scale[slot.start : slot.stop] = vectors[:, slot.start : slot.stop].std(correction=0)
        return scale.clamp(min=1e-12)


def average(state_dicts: Sequence[StateDict]) -> dict[str, Tensor]:
    """The average of all weights, summed in float64: p-diff (arXiv 2402.13144) calls it "ensemble", others a soup."""
    space = VectorSpace(state_dicts)
    return space.unflatten(space.flatten(state_dicts).mean(0, dtype=torch.float64).float()[None])[0]

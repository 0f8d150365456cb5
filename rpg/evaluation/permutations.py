"""Which hidden units of a network can be permuted without changing what it computes.

The network is exported to its graph of ATen operations; a value's channels are followed from the layer that makes them
to those that read them. Where an operation mixes or reorders channels in a way that is not known here, they are left
as they are: a symmetry may be missed, but none is invented.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rpg.tasks.base import ImageTask, Task

ELEMENTWISE = {"relu", "relu_", "gelu", "silu", "silu_", "leaky_relu", "tanh", "sigmoid", "hardtanh", "dropout",
               "clone", "contiguous", "alias", "to", "_assert_tensor_metadata"}  # fmt: skip
POOLING = {"pooled", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"}


@dataclass(frozen=True)
class Member:
    """An axis of a tensor along which the units of a group lie, ``repeat`` consecutive values for each unit."""

    tensor: str
    axis: int
    repeat: int = 1


@dataclass(frozen=True)
class Group:
    """Hidden units that permute together.

    Attributes:
        size: how many units.
        members: every axis that must be permuted with them.
    """

    size: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class _Value:
    """Channels of an intermediate value: their group, the axis they lie on, consecutive values a unit."""

    group: int
    axis: int
    repeat: int = 1


class _Groups:
    """Union-find of groups while the graph is walked."""

    def __init__(self) -> None:
        self.parents: list[int] = []
        self.sizes: list[int] = []
        self.members: list[list[Member]] = []
        self.fixed: list[bool] = []

    def new(self, size: int) -> int:
        self.parents.append(len(self.parents))
        self.sizes.append(size)
        self.members.append([])
        self.fixed.append(False)
        return len(self.parents) - 1

    def find(self, group: int) -> int:
        while self.parents[group] != group:
            group = self.parents[group]
        return group

    def add(self, group: int, tensor: str | None, axis: int, repeat: int = 1) -> None:
        if tensor is not None:
            self.members[self.find(group)].append(Member(tensor, axis, repeat))

    def union(self, a: int, b: int) -> None:
        a, b = sorted((self.find(a), self.find(b)))
        if a != b:
            self.parents[b] = a
            self.members[a] += self.members[b]
            self.fixed[a] |= self.fixed[b]

    def fix(self, group: int) -> None:
        self.fixed[self.find(group)] = True

    def free(self) -> list[Group]:
        roots = [g for g in range(len(self.parents)) if self.parents[g] == g and not self.fixed[g]]
        return [Group(self.sizes[g], tuple(dict.fromkeys(self.members[g]))) for g in roots if self.members[g]]


def permutation_groups(network: nn.Module, example: Tensor) -> list[Group]:
    """Groups of interchangeable hidden units, in the order in which the network computes them.

    Args:
        example: an input, ``[B, …]``.

    Returns:
        An empty list where the network cannot be exported.
    """
    training = network.training
    try:
        exported = torch.export.export(network.eval(), (example,))
    except Exception:  # control flow on data, unsupported operations, …: nothing is known about its symmetries
        return []
    finally:
        network.train(training)
    signature = exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    walk = _Walk(names)
    for node in exported.graph.nodes:
        walk.visit(node)
    return walk.groups.free()


def symmetries(task: Task) -> list[Group]:
    """Interchangeable hidden units of a task's network; none are known for a task without images to trace it by."""
    if not isinstance(task, ImageTask):
        return []
    with torch.random.fork_rng(devices=[]):
        return permutation_groups(task.build(), task.images("test")[:2])


class _Walk:
    """Follows channels through the graph, one node at a time."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names
        self.groups = _Groups()
        self.values: dict[Any, _Value] = {}

    def visit(self, node: Any) -> None:
        if node.op == "output":
            self._fix(node)
        if node.op != "call_function":
            return
        name = getattr(node.target, "__name__", "").split(".")[0]
        step = getattr(self, f"_{name}", None)
        if name in ELEMENTWISE or name in POOLING:
            result = self._same(node, pooling=name in POOLING)
        else:
            result = step(node) if step is not None else None
        if result is None:
            self._fix(node)
        else:
            self.values[node] = result

    def _fix(self, node: Any) -> None:
        for source in node.all_input_nodes:
            if source in self.values:
                self.groups.fix(self.values[source].group)

    def _name(self, node: Any) -> str | None:
        return self.names.get(node.name) if node is not None else None

    @staticmethod
    def _argument(node: Any, index: int, default: Any = None) -> Any:
        return node.args[index] if len(node.args) > index else default

    @staticmethod
    def _shape(node: Any) -> tuple[int, ...]:
        return tuple(node.meta["val"].shape)

    def _same(self, node: Any, pooling: bool) -> _Value | None:
        value = self.values.get(node.args[0])
        if value is not None and pooling and (value.axis != 1 or len(self._shape(node)) != 4):
            return None
        return value

    def _weighted(self, node: Any, group: int, axis: int) -> _Value | None:
        """A new value whose channels are the weight's first axis."""
        weight, bias = self._name(node.args[1]), self._name(self._argument(node, 2))
        if weight is None:  # computed weights
            return None
        self.groups.add(group, weight, 0)
        self.groups.add(group, bias, 0)
        return _Value(group, axis)

    def _conv2d(self, node: Any) -> _Value | None:
        source, weight = self.values.get(node.args[0]), self._name(node.args[1])
        out_channels, per_group = self._shape(node.args[1])[:2]
        num_groups = self._argument(node, 6, 1)
        if num_groups > 1:  # depthwise: every channel stays itself
            whole = per_group == 1 and num_groups == out_channels
            return self._weighted(node, source.group, 1) if whole and source and source.axis == 1 else None
        if source is not None:
            if source.axis != 1 or source.repeat != 1:
                return None
            self.groups.add(source.group, weight, 1)
        return self._weighted(node, self.groups.new(out_channels), 1)

    def _linear(self, node: Any) -> _Value | None:
        source, weight = self.values.get(node.args[0]), self._name(node.args[1])
        last = len(self._shape(node)) - 1
        if source is not None:
            if source.axis != last:
                return None
            self.groups.add(source.group, weight, 1, source.repeat)
        return self._weighted(node, self.groups.new(self._shape(node.args[1])[0]), last)

    def _batch_norm(self, node: Any) -> _Value | None:
        value = self.values.get(node.args[0])
        if value is None or value.axis != 1 or value.repeat != 1:
            return None
        for parameter in node.args[1:5]:
            self.groups.add(value.group, self._name(parameter), 0)
        return value

    def _layer_norm(self, node: Any) -> _Value | None:
        value = self.values.get(node.args[0])
        last = len(self._shape(node)) - 1
        if value is None or value.axis != last or value.repeat != 1 or len(node.args[1]) != 1:
            return None
        for parameter in node.args[2:4]:
            self.groups.add(value.group, self._name(parameter), 0)
        return value

    def _add(self, node: Any) -> _Value | None:
        first, second = (self.values.get(argument) for argument in node.args[:2])
        if first is None or second is None or (first.axis, first.repeat) != (second.axis, second.repeat):
            return None
        if self._shape(node.args[0]) != self._shape(node.args[1]):
            return None
        self.groups.union(first.group, second.group)
        return first

    _add_ = _add

    def _flatten(self, node: Any) -> _Value | None:
        value, shape = self.values.get(node.args[0]), self._shape(node.args[0])
        start, end = self._argument(node, 1, 0), self._argument(node, 2, -1) % len(shape)
        if value is None or (start, value.axis) != (1, 1) or end != len(shape) - 1:
            return None
        return _Value(value.group, 1, value.repeat * math.prod(shape[2:]))

    def _permute(self, node: Any) -> _Value | None:
        value = self.values.get(node.args[0])
        return None if value is None else replace(value, axis=list(node.args[1]).index(value.axis))

    def _mean(self, node: Any) -> _Value | None:
        value, rank = self.values.get(node.args[0]), len(self._shape(node.args[0]))
        axes = {axis % rank for axis in (self._argument(node, 1) or range(rank))}
        if value is None or value.axis in axes or value.repeat != 1:
            return None
        kept = self._argument(node, 2, False)
        return value if kept else replace(value, axis=value.axis - sum(axis < value.axis for axis in axes))

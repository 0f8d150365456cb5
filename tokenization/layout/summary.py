"""What a layout is made of, by kind of layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenization.layout.placement import Layer


@dataclass
class LayerGroup:
    """All layers of one kind. Over all groups, ``tokens`` add up to L and ``values + padding`` to ``L * D``.

    Attributes:
        kind: what the layers are.
        tensors: how many they are.
        values: how many values they hold.
        tokens: tokens that begin in them.
        padding: places left empty after them.
    """

    kind: str
    tensors: int = 0
    values: int = 0
    tokens: int = 0
    padding: int = 0

    @property
    def padding_share(self) -> float:
        """The part of the group's places that holds nothing."""
        return self.padding / (self.values + self.padding)


def group_layers(layers: Sequence[Layer], num_tokens: int, size: int) -> list[LayerGroup]:
    """Sum up layers by kind, in the order in which the kinds first appear."""
    groups: dict[str, LayerGroup] = {}
    ends = [layer.start for layer in layers[1:]] + [num_tokens * size]
    for layer, end in zip(layers, ends, strict=True):
        group = groups.setdefault(kind_of(layer.name, layer.shape), LayerGroup(kind_of(layer.name, layer.shape)))
        group.tensors += 1
        group.values += layer.num_values
        group.tokens += -(-end // size) - -(-layer.start // size)
        group.padding += end - layer.start - layer.num_values
    return list(groups.values())


def kind_of(name: str, shape: Sequence[int]) -> str:
    """A word for what a tensor does, judged by its name and number of dimensions."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("running_mean", "running_var"):
        return "batch statistics"
    if "lora" in name:
        return "adapter"
    if len(shape) > 1 and any(word in name for word in ("embed", "wte", "wpe")) and "proj" not in name:
        return "embedding"
    if len(shape) > 1:
        return "linear" if len(shape) == 2 else "convolution"
    return "bias" if leaf.endswith("bias") else "scale"

"""What a layout consists of: which tensors are in the tokens, where their values lie, how they are normalised.

Letters: L tokens of a checkpoint, D token width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.tensor_file import TensorSpec
from tokenization.compressed.form import Compressed
from tokenization.layout.canonical import Canonical
from tokenization.layout.normalization import LayerStatistics, Statistics, TensorSource
from tokenization.layout.placement import Layer, RunTable, TokenOptions
from tokenization.zoo.zoo import Zoo


class LayoutDescription:
    """All that ``layout.json`` and ``statistics.safetensors`` hold, and what follows from it.

    Attributes:
        options: how the tokens are cut.
        names: every key of the state dict, in order.
        layers: the tokenised tensors, in order.
        num_tokens: L.
        ties: ``{alias: name}``.
        statistics: the normalisation.
        constant_specs: ``{name: (dtype, shape)}`` of the tensors outside the tokens.
        canonical: the form that LoRA pairs are brought into before they are cut, if any; ``decode`` gives that form.
        compressed: pruned and quantised weights, if any: the names above are of their tokens, ``decode`` stores them.
        copied: those outside the tokens that differ in the zoo, and of which every network has the base's.
    """

    def __init__(
        self,
        options: TokenOptions,
        names: Sequence[str],
        layers: Sequence[Layer],
        num_tokens: int,
        ties: Mapping[str, str],
        constant_specs: Mapping[str, TensorSpec],
        statistics: Statistics,
        constant_source: TensorSource,
        constant_prefix: str = "",
        canonical: Canonical | None = None,
        compressed: Compressed | None = None,
        copied: Sequence[str] = (),
    ) -> None:
        self.options = options
        self.names = tuple(names)
        self.layers = tuple(layers)
        self.num_tokens = num_tokens
        self.ties = dict(ties)
        self.constant_specs = dict(constant_specs)
        self.statistics = statistics
        self.canonical = canonical
        self.compressed = compressed
        self.copied = tuple(copied)
        self._constant_source = constant_source
        self._constant_prefix = constant_prefix

    @property
    def token_size(self) -> int:
        """Token width D."""
        return self.options.size

    @property
    def num_values(self) -> int:
        """How many values of a checkpoint are in its tokens."""
        return sum(layer.num_values for layer in self.layers)

    @property
    def num_coordinates(self) -> int:
        """How many numbers a checkpoint is: its values."""
        return self.num_values

    @property
    def token_weight(self) -> Tensor:
        """``[L]`` float64: what a unit of each token is in normalised values, 1."""
        return torch.ones(self.num_tokens, dtype=torch.float64)

    @property
    def padding_share(self) -> float:
        """The part of ``L * D`` that holds nothing."""
        return 1 - self.num_values / (self.num_tokens * self.token_size)

    @cached_property
    def runs(self) -> RunTable:
        """What every single token is made of."""
        return RunTable(self.layers, self.token_size)

    @property
    def positions(self) -> Tensor:
        """(layer, token in the layer) of each token's first value, ``[L, 2]`` long; all different."""
        return torch.from_numpy(self.runs.positions(np.arange(self.num_tokens)))

    @property
    def mask(self) -> Tensor:
        """True where a token holds a value, ``[L, D]`` bool."""
        return self.mask_rows(torch.arange(self.num_tokens))

    def mask_rows(self, token_ids: Tensor | Sequence[int]) -> Tensor:
        """The rows ``token_ids`` (any shape ``[...]``) of ``mask``, ``[..., D]``, without making the rest of it."""
        ids = torch.as_tensor(token_ids, device="cpu")
        num_values = torch.from_numpy(self.runs.num_values(ids.reshape(-1).numpy())).reshape(ids.shape)
        return torch.arange(self.token_size) < num_values.unsqueeze(-1)

    def layer_statistics(self, index: int) -> LayerStatistics:
        """The normalisation of one layer."""
        return self.statistics.layer(index, self.layers[index].name)

    def checkpoint(self, zoo: Zoo, index: int) -> Checkpoint:
        """An entry of a zoo as it is cut into tokens: the zoo's own, its LoRA pairs in canonical form."""
        form = self.compressed or self.canonical
        return zoo.checkpoint(index) if form is None else form.checkpoint(zoo, index)

    def finished(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict as its tokens say it, as the zoo's checkpoints are stored."""
        return state_dict if self.compressed is None else self.compressed.compress(state_dict)

    @property
    def constants(self) -> dict[str, Tensor]:
        """The tensors outside the tokens, aliases included, as the base checkpoint has them."""
        return self.with_aliases({name: self.constant(name) for name in self.constant_specs})

    def constant(self, name: str) -> Tensor:
        """One tensor outside the tokens, in the memory map it is read from."""
        return self._constant_source.flat(self._constant_prefix + name).view(self.constant_specs[name][1])

    @property
    def copied_note(self) -> str:
        """What a user must know of ``copied``, as a sentence; empty where there is none."""
        if not self.copied:
            return ""
        shown = ", ".join(f"`{name}`" for name in self.copied[:6])
        more = f" and {len(self.copied) - 6} more" if len(self.copied) > 6 else ""
        source = "the zoo's first checkpoint" if self.options.base is None else self.options.base
        return f"Not learned but copied from {source}: {shown}{more}."

    def with_aliases(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors under every key that stands for one of them, in the order of the state dict."""
        return {name: stored[self.ties.get(name, name)] for name in self.names if self.ties.get(name, name) in stored}

    def spec(self, name: str) -> TensorSpec:
        """Stored dtype and shape of a key of the state dict."""
        name = self.ties.get(name, name)
        layer = self._layer_by_name.get(name)
        return self.constant_specs[name] if layer is None else (layer.dtype, layer.shape)

    @cached_property
    def _layer_by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("runs", "_layer_by_name")}


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

"""Many copies of one small network trained and run side by side: one tensor operation for all of them.

``torch.func.vmap`` over the weights makes a linear layer a batched matrix product and a convolution a grouped one. All
networks see the same images, so that the first layer is one large convolution. docs/log.md has the measurements.
T networks, B images, C channels.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

LARGE = 1 << 20
"""Values from which networks run one after the other: each fills the machine without company, batched operations are
slower on a CPU, and the activations of all would be held at once."""

Stacked = dict[str, Tensor]
"""The tensors of T networks of one structure, ``[T, *shape]`` each."""

Teacher = Callable[[Tensor], Tensor]
"""Maps images ``[B, …]`` to class probabilities ``[B, classes]``."""


class SideBySide:
    """T networks of one structure as one function.

    Networks must be free of random draws and of buffers that training changes (dropout, batch norm).

    Args:
        network: their structure; its own weights do not matter.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.is_large = sum(value.numel() for value in self.network.parameters()) >= LARGE
        for module in self.network.modules():
            if hasattr(module, "fused_attn") and not self.is_large:  # timm's switch: that kernel has no batching rule
                module.fused_attn = False  # type: ignore[assignment]

    def _call(self, weights: Stacked, images: Tensor) -> Tensor:
        return functional_call(self.network, weights, (images,))

    def __call__(self, weights: Stacked, images: Tensor) -> Tensor:
        """Logits ``[T, B, classes]`` of the T networks on the same images ``[B, C, H, W]``, or each on its own
        ``[T, B, C, H, W]``; what expanded tensors make of the same images is computed once for all."""
        own, total = 0 if images.dim() == 5 else None, len(next(iter(weights.values())))
        common = {name for name, value in weights.items() if value.stride(0) == 0 and len(value) > 1}  # of one memory
        if own is None and len(common) == len(weights):  # one network, asked for several times
            return self._call({name: value[0] for name, value in weights.items()}, images).expand(total, -1, -1)
        if self.is_large:
            networks = zip(*(value.unbind() for value in weights.values()), strict=True)
            batches = images if images.dim() == 5 else itertools.repeat(images)
            pairs = zip(networks, batches, strict=False)  # one batch may serve all
            return torch.stack([self._call(dict(zip(weights, each, strict=True)), batch) for each, batch in pairs])
        quick = getattr(self.network, "side_by_side", None)  # a network's own way to the same logits and gradients
        if quick is not None and own is None and not common and torch.is_grad_enabled():
            return quick(weights, images)
        given = {name: value[0] if name in common else value for name, value in weights.items()}
        dims = {name: None if name in common else 0 for name in weights}
        return vmap(self._call, in_dims=(dims, own))(given, images)

    @torch.inference_mode()
    def predict(self, weights: Stacked, images: Tensor, chunk: int = 64) -> Tensor:
        """Class probabilities ``[T, B, classes]``, ``chunk`` networks at a time."""
        total = len(next(iter(weights.values())))
        parts = [
            self({name: value[first : first + chunk] for name, value in weights.items()}, images).softmax(-1)
            for first in range(0, total, chunk)
        ]
        return torch.cat(parts)


def stack(state_dicts: Sequence[Mapping[str, Tensor]]) -> Stacked:
    """State dicts of one structure as ``[T, *shape]`` tensors."""
    return {name: torch.stack([each[name] for each in state_dicts]) for name in state_dicts[0]}


def alone(state_dict: Mapping[str, Tensor]) -> Stacked:
    """One network as a stack of one, which shares its memory."""
    return {name: value[None] for name, value in state_dict.items()}


def join_stacked(parts: Sequence[Stacked]) -> Stacked:
    """Stacked networks of several parts, one after the other."""
    return {name: torch.cat([each[name] for each in parts]) for name in parts[0]} if len(parts) > 1 else parts[0]


def unstack(weights: Stacked) -> list[dict[str, Tensor]]:
    """The state dict of each network; no two share memory."""
    total = len(next(iter(weights.values())))
    return [{name: value[i].clone() for name, value in weights.items()} for i in range(total)]


def repeat(state_dict: Mapping[str, Tensor], num: int) -> Stacked:
    """``num`` copies of one network, stacked."""
    return {name: value.detach().expand(num, *value.shape).clone() for name, value in state_dict.items()}

"""Peak memory of a computation, found without computing it: its operations run on tensors that have no storage."""

from __future__ import annotations

import math
import re
import resource
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenization.layouts import Layout
from tokenization.spectral.layout import SpectralLayout

LSTM_WORKSPACE = {torch.float32: 22, torch.bfloat16: 11}
"""Bytes an LSTM on a CPU writes for each value it returns, for its backward pass, which writes as many again. Measured,
since PyTorch's shape function for it says none. It asks the system for 61 and 43; the rest is never touched."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations allocate while it is active, and their peak.

    What existed before is not counted; a view costs nothing. What a kernel allocates and frees itself is not seen.

    Attributes:
        live: bytes alive now.
        peak: the most there ever were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and count what it returns."""
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._count(tensor, 0)
        result = func(*args, **(kwargs or {}))
        workspace = result[3] if func is torch.ops.aten.mkldnn_rnn_layer.default and args[-1] else None  # in training
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                size = _lstm_workspace(result[0]) if tensor is workspace else tensor.untyped_storage().nbytes()
                self._count(tensor, size)
        backward = func is torch.ops.aten.mkldnn_rnn_layer_backward.default
        self.peak = max(self.peak, self.live + (_lstm_workspace(result[0]) if backward else 0))
        return result

    def _count(self, tensor: Tensor, num_bytes: int) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # which Python's object of a storage keeps as long as that lives
        if key in self._known:
            return

        def forget(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= num_bytes

        self._known[key] = weakref.ref(storage, forget)
        self.live += num_bytes


def _lstm_workspace(values: Tensor) -> int:
    return LSTM_WORKSPACE.get(values.dtype, 0) * values.numel()


def peak_resident_bytes() -> int:
    """The highest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the parent held when it started this process
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def fake_copy(network: nn.Module) -> nn.Module:
    """Give a network on the meta device fake parameters and buffers on the CPU, in place; call it in a fake mode."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, nn.Parameter(_empty_like(parameter), parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, _empty_like(buffer))
    return network


def fake_mode() -> FakeTensorMode:
    """The mode in which tensors have shapes, dtypes and devices, but no values."""
    return FakeTensorMode()


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _lstm(input_shape: Any, *arguments: Any, out_shape: Any = None, **_: Any) -> int:
    """One layer and direction ``[L, B, in]``: four gates of in + H inputs each at every place."""
    length, batch, d_input = input_shape
    d_model = out_shape[0][-1]
    return 8 * length * batch * d_model * (d_input + d_model)


def _lstm_backward(input_shape: Any, weight: Any, hidden_weight: Any, *arguments: Any, **_: Any) -> int:
    """Twice the forward pass: the gradients of inputs and of weights."""
    length, batch, d_input = input_shape
    d_model = hidden_weight[-1]
    return 16 * length * batch * d_model * (d_input + d_model)


RECURRENCES = {
    torch.ops.aten.mkldnn_rnn_layer: _lstm,
    torch.ops.aten.mkldnn_rnn_layer_backward: _lstm_backward,
}
"""What PyTorch's own counter does not know."""


@dataclass(frozen=True)
class GenerationFlops:
    """FLOPs of one generated network.

    Attributes:
        backbone: all prototypes.
        once: what is computed once per token.
        step: one call of the denoiser for one token, with its share of what a tile computes once a step.
        known: what of the tokens is known in closed form, of the whole network.
        directions: the products of coefficients with the zoo's directions, of the whole network.
        total: all of them, with every step of every token.
    """

    backbone: int
    once: int
    step: int
    known: int
    directions: int
    total: int


def directions_flops(layout: Layout) -> int:
    """Of making one network's values from its coefficients, two for each of the L·k·D numbers of the directions."""
    return 2 * math.prod(layout.basis.shape) if isinstance(layout, SpectralLayout) else 0


def count_flops() -> Any:
    """A context in which operations are counted, those of recurrences too; ask it ``get_total_flops()``."""
    from torch.utils.flop_counter import FlopCounterMode  # which loads triton

    return FlopCounterMode(display=False, custom_mapping=RECURRENCES)

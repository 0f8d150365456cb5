"""Peak memory by component, and what tensors and checkpoints take of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenization.layouts import Layout

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes by component; the components are the fields."""

    def components(self) -> dict[str, int]:
        """``{component: bytes}``."""
        return dataclasses.asdict(self)

    @property
    def total(self) -> int:
        """Peak in bytes."""
        return sum(self.components().values())


@dataclass(frozen=True)
class TrainingMemory(Memory):
    """Peak memory of a training process.

    Attributes:
        weights: parameters and buffers, fp32.
        gradients: of every parameter, fp32.
        optimizer: AdamW's two moments, of 4 bytes each or of 1.
        ema: the weights' moving average.
        activations: what the forward and the backward pass hold at their peak, gradients apart.
        batch: the token rows that are computed at a time, and their noise.
        waiting: rows that are read ahead, always in the host's memory.
        cache: the encoded zoo, where it is small enough to be kept; in the host's memory too.
        fitting: what the zoo's directions are found with, in the host's memory and before everything else.
        libraries: what the first optimizer makes PyTorch load, in the host's memory.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    batch: int
    waiting: int
    cache: int
    fitting: int = 0
    libraries: int = 0

    @property
    def total(self) -> int:
        """Peak in bytes, of the steps or of what comes before them."""
        return max(self.fitting, self._steps)

    @property
    def on_device(self) -> int:
        """The part of the steps' peak that an accelerator has to hold."""
        return self._steps - self.waiting - self.cache - self.libraries

    @property
    def _steps(self) -> int:
        return sum(self.components().values()) - self.fitting


@dataclass(frozen=True)
class GenerationMemory(Memory):
    """Peak memory of generation into files. The residual means are read from the memory map and let go.

    Attributes:
        weights: parameters and buffers, fp32, and in bf16 once more what is multiplied in bf16.
        prototypes: of one network, or of the networks of one tile.
        backbone: what the backbone holds beyond them while it computes them.
        tile: the rows that are denoised together and what the denoiser makes of them.
        loading: the fp32 weights as they are and as they are read, before anything else.
    """

    weights: int
    prototypes: int
    backbone: int
    tile: int
    loading: int

    @property
    def total(self) -> int:
        """Peak in bytes: the backbone is done when the first tile begins, and loading before both."""
        return max(self.loading, self.weights + self.prototypes + max(self.backbone, self.tile))


def checkpoint_bytes(layout: Layout) -> int:
    """Bytes of the tokenised tensors of one checkpoint."""
    return sum(layer.num_values * layer.dtype.itemsize for layer in layout.layers)


def held_bytes(layout: Layout) -> int:
    """What each network adds when networks are generated into memory: its tokens and its state dict."""
    return layout.num_tokens * layout.token_size * FLOAT_BYTES + checkpoint_bytes(layout)


def moment_bytes(optimizer: str, parameter: Tensor) -> int:
    """AdamW's two moments of a parameter; in 8 bits (arXiv 2110.02861) a block of 256 shares a scale of 4 bytes."""
    if optimizer == "adamw8bit" and parameter.numel() >= 4096:
        return 2 * (parameter.numel() + FLOAT_BYTES * math.ceil(parameter.numel() / 256))
    return 2 * FLOAT_BYTES * parameter.numel()


def num_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of those that are tensors."""
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

"""Floating-point operations of training steps and of generated networks, counted without computing them.

Only matrix products, convolutions and recurrences count, two operations a multiplication and addition, as is usual.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from tokenization.layouts import Layout
from tokenization.spectral.layout import SpectralLayout


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


def count_flops() -> FlopCounterMode:
    """A context in which operations are counted, those of recurrences too; ask it ``get_total_flops()``."""
    return FlopCounterMode(display=False, custom_mapping=RECURRENCES)

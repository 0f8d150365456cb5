"""Fixed sinusoidal embeddings of where a token lies (Vaswani et al. 2017, section 3.5; in 2-D as RPG uses them)."""

from __future__ import annotations

import torch
from torch import Tensor

LONGEST_PERIOD = 10_000.0
"""The slowest wave repeats after about this many times 2 pi."""


def sinusoid_1d(index: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of ``index`` at frequencies from 1 down to nearly 1 / 10,000.

    Args:
        index: ``[L]``, whole or real numbers.
        width: of the embedding; with an odd one the last cosine is left out.

    Returns:
        ``[L, width]`` float32, computed in float64: a float32 product is off by whole radians at large indices.

    Raises:
        ValueError: ``width`` is below 1 or ``index`` is not 1-D.
    """
    if width < 1 or index.dim() != 1:
        raise ValueError(f"width {width} must be at least 1, and the index {list(index.shape)} of shape [L]")
    num_frequencies = (width + 1) // 2
    steps = torch.arange(num_frequencies, dtype=torch.float64, device=index.device)
    angles = index.to(torch.float64)[:, None] * LONGEST_PERIOD ** (-steps / num_frequencies)  # [L, width / 2]
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width].to(torch.float32)


def sinusoid_2d(positions: Tensor, width: int) -> Tensor:
    """Half of the width for the layer, half for the token in the layer (which gets the odd place, if there is one).

    Args:
        positions: (layer, token in the layer), ``[L, 2]``.
        width: of the embedding, at least 2.

    Returns:
        ``[L, width]`` float32.

    Raises:
        ValueError: ``width`` is below 2 or ``positions`` is not ``[L, 2]``.
    """
    if width < 2 or positions.dim() != 2 or positions.shape[1] != 2:
        raise ValueError(f"width {width} must be at least 2, and the positions {list(positions.shape)} of shape [L, 2]")
    layer_width = width // 2
    by_axis = [sinusoid_1d(positions[:, 0], layer_width), sinusoid_1d(positions[:, 1], width - layer_width)]
    return torch.cat(by_axis, dim=1)


def position_embedding(kind: str, positions: Tensor, width: int) -> tuple[bool, Tensor]:
    """Whether the embedding is learned, and its (initial) value ``[L, H]``."""
    if kind == "2d":
        return False, sinusoid_2d(positions, width)
    if kind == "layer":
        return False, sinusoid_1d(positions[:, 0], width)
    if kind == "1d":
        return False, sinusoid_1d(torch.arange(len(positions)), width)
    if kind == "learned":
        return True, torch.randn(len(positions), width) * 0.02
    return False, torch.zeros(len(positions), width)

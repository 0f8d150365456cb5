"""The arithmetic of compressed weights: codes and scales, codes two in a byte, values in compressed rows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenization.errors import InputError

LARGEST = {8: 127, 4: 7}
"""The largest code of so many bits; the smallest that is made is its negative."""


def quantised(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric codes of a weight ``[out, …]`` and its scales ``[out]``: a channel's largest value is the last code.

    Args:
        weight: floats.
        bits: 8 or 4.

    Returns:
        codes, float32 whole numbers of the weight's shape, and scales; weight ≈ codes · scale.
    """
    largest = weight.detach().flatten(1).abs().amax(1)
    scale = (largest / LARGEST[bits]).clamp(min=torch.finfo(weight.dtype).tiny)
    return (weight / by_channel(scale, weight)).round(), scale


def by_channel(scale: Tensor, like: Tensor) -> Tensor:
    """Scales, one an output channel, in a shape that multiplies ``like`` ``[out, …]``."""
    return scale.reshape(-1, *[1] * (like.ndim - 1))


def packed(codes: Tensor) -> Tensor:
    """Codes -8 … 7 ``[out, …]`` → uint8 ``[out, rest / 2]`` rounded up."""
    flat = F.pad(codes.reshape(codes.shape[0], -1) + 8, (0, codes[0].numel() % 2), value=8)
    pairs = flat.to(torch.uint8).unflatten(1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpacked(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `packed` made of codes of ``shape``, int8."""
    pairs = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    return (pairs[:, : math.prod(shape[1:])].to(torch.int8) - 8).reshape(shape)


def scattered(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...], where: str) -> tuple[Tensor, ...]:
    """A dense tensor of values, and its mask, from compressed rows; foreign indices may be anything.

    Raises:
        InputError: they do not fit; ``where`` says of what.
    """
    width, counts, columns = math.prod(shape[1:]), rows.long().diff(), columns.long()
    whole = int(rows[0]) == 0 and int(rows[-1]) == len(columns) and bool((counts >= 0).all())
    inside = whole and bool(((columns >= 0) & (columns < width)).all())
    places = torch.arange(shape[0]).repeat_interleave(counts) * width + columns if inside else columns
    if not inside or not bool((places.diff() > 0).all()):
        raise InputError(f"{where} has indices of compressed rows that do not fit; save the network again")
    dense, mask = torch.zeros(math.prod(shape), dtype=values.dtype), torch.zeros(math.prod(shape), dtype=torch.bool)
    dense[places], mask[places] = values, True
    return dense.view(shape), mask.view(shape)

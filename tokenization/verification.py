"""Check that a zoo survives its own tokens: every checkpoint, cut and put together again, is what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenization.checkpoint import Checkpoint
from tokenization.errors import InputError
from tokenization.headers import tensor_at
from tokenization.layout import TokenLayout
from tokenization.zoo import Zoo

SMALL = 2.0**-24
"""A value this much smaller than the largest of its tensor may be off by the largest one's rounding, times this."""


@dataclass(frozen=True)
class RoundTrip:
    """What came back. ``num_exact`` of ``num_values`` values are the same bits; the rest within one rounding."""

    num_checkpoints: int
    num_values: int
    num_exact: int


def verify_round_trip(
    zoo: Zoo, layout: TokenLayout, *, progress: Callable[[int, int], None] | None = None
) -> RoundTrip:
    """Encode every checkpoint into float64 tokens, decode them, and compare with what is on disk.

    Holds one checkpoint's tokens and values in memory.

    Args:
        zoo: the checkpoints.
        layout: fitted to them.
        progress: called with (checked, total) checkpoints.

    Raises:
        InputError: names the file and the tensor that does not come back to one unit in the last place.
    """
    num_exact = 0
    for index in range(len(zoo)):
        checkpoint = zoo.checkpoint(index)
        decoded = layout.decode(layout.encode(checkpoint, torch.float64))
        num_exact += sum(_num_exact(checkpoint, layer.name, decoded[layer.name]) for layer in layout.layers)
        if progress is not None:
            progress(index + 1, len(zoo))
    return RoundTrip(len(zoo), len(zoo) * layout.num_values, num_exact)


def _num_exact(checkpoint: Checkpoint, name: str, decoded: Tensor) -> int:
    stored, found = checkpoint.flat(name), decoded.reshape(-1)
    exact = found == stored
    num_exact = int(exact.sum())
    if num_exact < stored.numel():
        rounding = torch.finfo(stored.dtype).eps
        left, right = found[~exact].double(), stored[~exact].double()
        bound = rounding * torch.maximum(right.abs(), SMALL * stored.abs().max().double())
        errors = (left - right).abs()
        if not bool((errors <= bound).all()):
            raise InputError(
                tensor_at(checkpoint.path, name),
                f"an error of {float(errors.max()):.3g} after tokens and back",
                "at most one unit in the last place",
                "report it, with this file",
            )
    return num_exact

"""Check that a zoo survives its own tokens: every checkpoint, cut and put together again, is what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.safetensors import tensor_at
from tokenization.errors import InputError
from tokenization.layout.layout import TokenLayout
from tokenization.lora.low_rank import product_distance
from tokenization.zoo.zoo import Zoo

SMALL = 2.0**-24
"""A value this much smaller than the largest of its tensor may be off by the largest one's rounding, times this."""

PRODUCT_ROUNDING = 4.0
"""Units of rounding by which the product of canonical factors may be off, in the Frobenius norm."""


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

    LoRA pairs are compared with their canonical form, whose product is compared with that on disk; pruned and quantised
    weights in the form of their tokens.

    Holds one checkpoint's tokens and values in memory.

    Args:
        zoo: the checkpoints.
        layout: fitted to them.
        progress: called with (checked, total) checkpoints.

    Raises:
        InputError: names the file and the tensor that does not come back to one unit in the last place, or the pair
            whose product changes.
    """
    num_exact = 0
    for index in range(len(zoo)):
        checkpoint = layout.checkpoint(zoo, index)
        _check_products(zoo.checkpoint(index), checkpoint, layout)
        decoded = layout.decode(layout.encode(checkpoint, torch.float64))
        decoded = decoded if layout.compressed is None else layout.compressed.expand(decoded)
        num_exact += sum(_num_exact(checkpoint, layer.name, decoded[layer.name]) for layer in layout.layers)
        if progress is not None:
            progress(index + 1, len(zoo))
    return RoundTrip(len(zoo), len(zoo) * layout.num_values, num_exact)


def _check_products(original: Checkpoint, canonical: Checkpoint, layout: TokenLayout) -> None:
    """Check that canonical LoRA pairs have the products of the original ones, to the rounding of their dtype."""
    for pair in layout.canonical.pairs if layout.canonical else ():
        (a, b), (other_a, other_b) = ([c.flat(x.name).view(x.shape) for x in pair] for c in (original, canonical))
        distance, norm = product_distance(a, b, other_a, other_b)
        rounding = max(torch.finfo(layer.dtype).eps for layer in pair)
        smallest = 1e-13 * float(a.double().norm() * b.double().norm())  # float64's own rounding on the way
        if distance > PRODUCT_ROUNDING * rounding * norm + smallest:
            what = f"{tensor_at(original.path, pair[1].name)}: the product B A, of norm {norm:.3g}"
            why = f"is off by {distance:.3g} in canonical form, more than the rounding of its dtype"
            raise InputError(f"{what}, {why}; set tokens.lora_canonical to none, and report it with this file")


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
            what = f"{tensor_at(checkpoint.path, name)} is off by {float(errors.max()):.3g} after tokens and back"
            raise InputError(f"{what}, more than one unit in the last place; report it, with this file")
    return num_exact

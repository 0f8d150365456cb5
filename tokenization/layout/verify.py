"""Check that a zoo survives its own tokens: every checkpoint, cut and put together again, is what it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint, bytes_of, is_counter
from tokenization.checkpoint.progress import steps
from tokenization.checkpoint.safetensors import tensor_at
from tokenization.errors import InputError
from tokenization.layout.layout import TokenLayout
from tokenization.layout.normalization import VARIANCE_OFFSET, LayerStatistics
from tokenization.layout.placement import Layer, as_reals
from tokenization.lora.adapter import product_distance
from tokenization.zoo.zoo import Zoo

SMALLEST_STEP = 2.0**-46
"""How far off a value may be, as a part of it or of its centre, where its own dtype would be finer (`TokenLayout`)."""

PRODUCT_ROUNDING = 4.0
"""Units of rounding by which the product of canonical factors may be off, in the Frobenius norm."""


@dataclass(frozen=True)
class RoundTrip:
    """What came back. ``num_exact`` of ``num_values`` values are the same bits; the rest within the layout's bound.

    ``num_constants`` values outside the tokens are the same in all checkpoints, and as they are in the networks.
    """

    num_checkpoints: int
    num_values: int
    num_exact: int
    num_constants: int


def verify_round_trip(zoo: Zoo, layout: TokenLayout) -> RoundTrip:
    """Encode every checkpoint into float64 tokens, decode whole networks, and compare all of them with what is on disk.

    LoRA pairs are compared with their canonical form, whose product is compared with that on disk; pruned and quantised
    weights in the form of their tokens. Holds one checkpoint's tokens and values in memory.

    Raises InputError that names the file and the tensor that comes back less closely than `TokenLayout` promises, or
    the pair whose product changes.
    """
    num_exact, num_constants = 0, 0
    for index in steps("checking tokens", range(len(zoo))):
        checkpoint = layout.checkpoint(zoo, index)
        _check_products(zoo.checkpoint(index), checkpoint, layout)
        network = layout.decode(layout.encode(checkpoint, torch.float64))
        network = network if layout.compressed is None else layout.compressed.expand(network)
        for place, layer in enumerate(layout.layers):
            num_exact += _num_exact(checkpoint, layer, layout.layer_statistics(place), network[layer.name])
        num_constants = _num_constants(checkpoint, layout, network)
    return RoundTrip(len(zoo), len(zoo) * layout.num_values, num_exact, num_constants)


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


def _num_exact(checkpoint: Checkpoint, layer: Layer, statistics: LayerStatistics, decoded: Tensor) -> int:
    """How many values of a layer are the same bits. Raises InputError where one is off by more than is promised."""
    stored = as_reals(checkpoint.flat(layer.name))
    found = as_reals(decoded.reshape(-1))
    exact = found == stored
    num_exact = int(exact.sum())
    if num_exact < stored.numel():
        left, right = found[~exact].double(), stored[~exact].double()
        centre = VARIANCE_OFFSET * statistics.variance_mean or statistics.centre_at(~exact)
        reference = torch.as_tensor(centre, dtype=torch.float64).abs()
        bound = torch.finfo(stored.dtype).eps * right.abs()
        bound = bound.maximum(SMALLEST_STEP * right.abs().maximum(reference))
        errors = (left - right).abs()
        if statistics.identity or not statistics.scale or not bool((errors <= bound).all()):
            what = f"{tensor_at(checkpoint.path, layer.name)} is off by {float(errors.max()):.3g} after tokens and back"
            raise InputError(f"{what}, more than rounding explains; report it, with this file")
    return num_exact


def _num_constants(checkpoint: Checkpoint, layout: TokenLayout, network: Mapping[str, Tensor]) -> int:
    """How many values outside the tokens are those of a checkpoint; what is known to be another's does not count.

    Raises InputError if one differs, a key is missing, or a tied one is not a copy.
    """
    num_same = 0
    for name in checkpoint.order:
        tensor, stored = network.get(name), checkpoint.ties.get(name, name)
        info, same = checkpoint.info(name), tensor is not None
        if tensor is not None and name != stored:
            same = torch.equal(bytes_of(tensor), bytes_of(network[stored]))
        elif tensor is not None and name in layout.constant_specs and name not in layout.copied:
            same = torch.equal(bytes_of(tensor), bytes_of(checkpoint.flat(name)))
            same = same or is_counter(name, info.dtype, info.num_values)
            num_same += tensor.numel()
        if not same:
            what = f"{tensor_at(checkpoint.path, name)} is another one in a network that is put together of its tokens"
            raise InputError(f"{what}; report it, with this file")
    return num_same

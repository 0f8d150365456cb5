"""Checkpoints of one network merged into one safetensors file, a tensor at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rpg.merging.parts import METADATA_KEY, Digests, Merge, Part, merge_values
from rpg.seeding import make_rng
from tokenization.checkpoint.safetensors import ORDER_KEY, TIES_KEY, tensor_at
from tokenization.checkpoint.tensor_file import TensorFile, header_of
from tokenization.checkpoint.weights import AS_FOUND, Chosen
from tokenization.errors import InputError

COUNTER = "num_batches_tracked"
"""Ending of integers that may differ: batch normalisation's counters, of which the largest is kept."""


def merge_files(
    paths: Sequence[Path],
    merge: Merge,
    output: Path,
    *,
    base: Path | None = None,
    chosen: Chosen = AS_FOUND,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Merge networks into a safetensors file, written whole or not at all. One tensor of each is held at a time.

    Args:
        paths: checkpoints of any kind that is read, of one structure.
        merge: how.
        output: the file, ``*.safetensors``; it must not be there yet.
        base: what all of them began with, of methods that merge deviations.
        chosen: which weights of each file, where it holds several, and the prefix to cut off their names.
        progress: called with (merged, total) tensors.

    Raises:
        InputError: names, shapes or dtypes differ; an integer tensor differs that is not a known counter; values are
            not finite; an option that the method does not have.
    """
    weights, options = merge.settled(len(paths))
    if merge.needs_base != (base is not None):
        what = "merges deviations from what all networks began with; name it with --base FILE"
        raise InputError(f"--method {merge.method} {what if merge.needs_base else 'has no use for --base'}")
    if output.suffix != ".safetensors" or output.exists():
        what = "already exists" if output.exists() else "does not end in .safetensors"
        raise InputError(f"{output} {what}; name another file with --output")
    parts = [Part.open(path, chosen) for path in paths]
    first, begun = parts[0], None if base is None else Part.open(base, chosen)
    for part in parts[1:]:
        part.require(first)
    if begun is not None:
        begun.require(first, dtypes=False)
    ties = {a: n for a, n in first.ties.items() if all(part.ties.get(a) == n for part in parts)}
    specs = {name: first.spec(name) for name in first.names if name not in ties}
    strings = {"format": "pt", ORDER_KEY: json.dumps(first.names), **({TIES_KEY: json.dumps(ties)} if ties else {})}
    with contextlib.closing(Digests([*parts, *([begun] if begun is not None else [])])) as digests:
        record = digests.record(merge, parts, weights, begun, wait=False)
        with TensorFile(output, specs, {**strings, METADATA_KEY: record}) as file:
            for done, name in enumerate(specs):
                made = _merged(name, parts, begun, merge, weights, options)
                file.write(name, 0, made)
                for part in [*parts, *([begun] if begun is not None else [])]:
                    part.release(name)
                if progress is not None:
                    progress(done + 1, len(specs))
            record = digests.record(merge, parts, weights, begun, wait=True)  # as long as the one without digests
            file.write_bytes(header_of(specs, {**strings, METADATA_KEY: record})[0], 0)
    return output


def _merged(
    name: str, parts: Sequence[Part], base: Part | None, merge: Merge, weights: Tensor, options: dict[str, object]
) -> Tensor:
    """One tensor of the merged network, in the stored dtype."""
    dtype, _ = parts[0].spec(name)
    if not dtype.is_floating_point or not parts[0].tensor(name).numel():
        return _agreed(name, parts)
    precision = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
    if merge.method == "linear":
        made = torch.zeros(parts[0].tensor(name).numel(), dtype=precision)
        scaled = weights / weights.sum() if options["normalize"] else weights
        for part, weight in zip(parts, scaled.tolist(), strict=True):
            made.add_(part.tensor(name).reshape(-1).to(precision), alpha=weight)
    else:
        precision = torch.float64 if dtype == torch.float64 else torch.float32
        values = torch.stack([part.tensor(name).reshape(-1).to(precision) for part in parts])
        begun = None if base is None else base.tensor(name).reshape(-1).to(precision)
        made = merge_values(merge.method, values, begun, weights, make_rng(merge.seed, name), **options)  # type: ignore[arg-type]
        if name.endswith("running_var"):  # where signs are elected it may fall below 0
            made = made.clamp(min=float(values.min()))
    made = made.to(dtype)
    if not made.float().isfinite().all():
        return _agreed(name, parts)  # masks of -inf
    return made


def _agreed(name: str, parts: Sequence[Part]) -> Tensor:
    """A tensor that is not merged: the same in all of them, or a counter."""
    first = parts[0].tensor(name)
    other = next((part for part in parts[1:] if not _same(part.tensor(name), first)), None)
    if other is None:
        return first
    if name.endswith(COUNTER):
        return torch.stack([part.tensor(name) for part in parts]).amax(0)
    kind = "NaN or infinity after merging" if first.dtype.is_floating_point else f"values of {first.dtype}"
    what = f"{tensor_at(other.path, name)} differs from that of {parts[0].path}, and has {kind}, which are not merged"
    raise InputError(f"{what}; leave one of the two out")


def _same(tensor: Tensor, other: Tensor) -> bool:
    flat, expected = (each.contiguous().reshape(-1).view(torch.uint8) for each in (tensor, other))
    return torch.equal(flat, expected)

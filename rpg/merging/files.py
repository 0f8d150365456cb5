"""Checkpoints of one network merged into one file, one tensor at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.merging.methods import NORMALIZED, Merge, merge_values
from rpg.seeding import make_rng
from tokenization.checkpoint.checkpoint import Checkpoint, has_plain_names, pickled_files, read_state_dict
from tokenization.checkpoint.safetensors import ORDER_KEY, TIES_KEY, TensorSpec, tensor_at
from tokenization.checkpoint.tensor_file import TensorFile, find_ties, header_of
from tokenization.checkpoint.weights import AS_FOUND, Chosen
from tokenization.errors import InputError
from tokenization.files import file_digest
from tokenization.lora.adapter import partner_of

METADATA_KEY = "rpg.merge"
"""Metadata key: JSON object with the method, its settings and the files that were merged, each with its digest."""


@dataclass
class Part:
    """A network to merge.

    Attributes:
        names: every key of its state dict, in order.
        ties: ``{alias: stored name}``.
        files: what its values lie in.
        specs: dtype and shape of each tensor.
        values: the checkpoint that they are read from, or all of them.
    """

    path: Path
    names: list[str]
    ties: dict[str, str]
    files: list[Path]
    specs: dict[str, TensorSpec]
    values: Checkpoint | dict[str, Tensor]

    @classmethod
    def open(cls, path: Path, chosen: Chosen = AS_FOUND) -> Part:
        """Open a checkpoint of any kind, under the names of the plain network.

        Its values stay on the disk where they are safetensors of these names already. Raises InputError if it is
        broken, or as `read_weights` says.
        """
        pickles = pickled_files(path)
        checkpoint = None if pickles else Checkpoint.open(path)
        files = pickles if checkpoint is None else sorted(checkpoint.sizes)
        if checkpoint is not None and has_plain_names(checkpoint, chosen):
            specs = {name: checkpoint.info(name).spec for name in checkpoint.order}
            return cls(path, list(checkpoint.order), dict(checkpoint.ties), files, specs, checkpoint)
        values = read_state_dict(path, chosen)
        specs = {name: (value.dtype, tuple(value.shape)) for name, value in values.items()}
        return cls(path, list(values), find_ties(values), files, specs, values)

    def tensor(self, name: str) -> Tensor:
        """A tensor in its shape, to be read only."""
        if isinstance(self.values, Checkpoint):
            return self.values.flat(name).view(self.specs[name][1])
        return self.values[name]

    def release(self, name: str) -> None:
        """Drop a tensor's pages from this process."""
        if isinstance(self.values, Checkpoint):
            self.values.release(self.ties.get(name, name))

    def require(self, first: Part, *, dtypes: bool = True, ranks: bool = True) -> None:
        """Check that names, shapes and dtypes are those of ``first``; ``ranks``: those of LoRA factors, too.

        Raises:
            InputError: names the first tensor that differs.
        """
        missing = next((name for name in first.names if name not in set(self.names)), None)
        extra = next((name for name in self.names if name not in set(first.names)), None)
        cure = "merge checkpoints of one network"
        if missing is not None or extra is not None:
            where, other = (self.path, first.path) if missing is not None else (first.path, self.path)
            raise InputError(f"{tensor_at(where, str(missing or extra))} is missing, but {other} has it; {cure}")
        for name in first.names:
            (dtype, shape), (own_dtype, own_shape) = self.specs[name], first.specs[name]
            side = "" if ranks else (partner_of(name) or ("",))[0]
            compared = {"A": slice(1, None), "B": slice(1)}.get(side, slice(None))
            if shape[compared] != own_shape[compared] or (dtypes and dtype != own_dtype):
                found, expected = (f"{d} of shape {list(s)}" for d, s in ((dtype, shape), (own_dtype, own_shape)))
                raise InputError(f"{tensor_at(self.path, name)} is {found}, but {expected} in {first.path}; {cure}")


class Digests:
    """SHA-256 of all parts' files, taken beside the work."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._found: list[list[Future[str]]] = [
            [self._pool.submit(file_digest, file) for file in part.files] for part in parts
        ]

    def record(self, merge: Merge, parts: Sequence[Part], weights: Tensor, base: Part | None, *, wait: bool) -> str:
        """The text under `METADATA_KEY`; without ``wait`` with zeros in place of digests, in the same length."""
        rows: list[dict[str, Any]] = []
        for part, futures in zip([*parts, *([base] if base is not None else [])], self._found, strict=True):
            found = [future.result() if wait else "0" * 64 for future in futures]
            rows.append({"path": str(part.path), "sha256": found[0] if len(found) == 1 else found})
        record: dict[str, Any] = merge.record()
        if base is not None:
            record["base"] = rows.pop()
        if merge.method in NORMALIZED:
            rows = [{**row, "weight": weight} for row, weight in zip(rows, weights.tolist(), strict=True)]
        return json.dumps({**record, "parts": rows})

    def close(self) -> None:
        """Give up what is not done yet."""
        self._pool.shutdown(wait=True, cancel_futures=True)


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
        output: the file, ``*.safetensors``; it must not be there yet.
        base: what all of them began with, of methods that merge deviations.
        chosen: which weights of each file, where it holds several, and the prefix to cut off their names.

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
    specs = {name: first.specs[name] for name in first.names if name not in ties}
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
    dtype, _ = parts[0].specs[name]
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

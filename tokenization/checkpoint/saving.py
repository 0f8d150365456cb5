"""Checkpoints to disk: one safetensors file, the same bytes for the same tensors and metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenization.checkpoint.pickles import check_tensors
from tokenization.checkpoint.safetensors import DTYPES, ORDER_KEY, TIES_KEY, tensor_at
from tokenization.errors import InputError
from tokenization.files import publish

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def header_of(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """Lay out a safetensors file.

    The library's own writer puts the metadata in random order; here the same input gives the same bytes.

    Args:
        tensors: dtype and shape by name.
        metadata: strings for the header.

    Returns:
        The bytes that the file begins with (length and header), the offset of every tensor in the file and the size
        of the file, in bytes. Wider dtypes come first, so that every tensor is aligned; within a dtype the order is
        kept.
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offsets: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        offsets[name] = end
        end += math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {name: start + offset for name, offset in offsets.items()}
    return len(text).to_bytes(8, "little") + text, places, start + end


def save_checkpoint(
    path: Path | str,
    state_dict: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    ties: Mapping[str, str] | None = None,
    *,
    materialize_ties: bool = False,
) -> None:
    """Write a state dict as one safetensors file, atomically, order and ties recorded in the metadata.

    Args:
        path: the file, ``*.safetensors``; replaced if it exists.
        state_dict: dense tensors on any device.
        metadata: further strings for the header.
        ties: ``{alias: stored name}`` in addition to those found: keys whose tensors are the same memory.
        materialize_ties: store aliases as copies instead, so that any loader finds every key in the file.

    Raises:
        InputError: a tensor cannot be stored, a tie is wrong, or the disk refuses; ``path`` is then as it was.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(str(path), f"the ending {path.suffix!r}", "'.safetensors'", "rename it")
    tensors = check_tensors(state_dict, path)
    for name, tensor in tensors.items():
        if name == "__metadata__" or tensor.dtype not in _CODES:
            raise InputError(tensor_at(path, name), f"dtype {tensor.dtype}", "a name and dtype that safetensors knows")
    all_ties = {**find_ties(tensors), **(ties or {})}
    for alias, name in all_ties.items():
        if name not in tensors or name in all_ties:
            raise InputError(tensor_at(path, alias), f"a tie to {name!r}", "a tie to a stored tensor")
    order = [*tensors, *(alias for alias in all_ties if alias not in tensors)]
    strings = {"format": "pt", **(metadata or {}), ORDER_KEY: json.dumps(order)}  # transformers insists on the format
    if all_ties and not materialize_ties:
        strings[TIES_KEY] = json.dumps(all_ties)
    stored = {n: tensors[all_ties.get(n, n)] for n in order if materialize_ties or n not in all_ties}
    header, offsets, _ = header_of({n: (t.dtype, tuple(t.shape)) for n, t in stored.items()}, strings)
    with publish(path) as temporary, open(temporary, "wb", buffering=0) as file:
        _write(file, header)
        for name in offsets:
            _write(
                file, stored[name].cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
            )


def find_ties(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """``{alias: first name}`` of the entries that are the same memory in the same shape and dtype."""
    first: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, tensor in state_dict.items():
        if tensor.numel() == 0:
            continue
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key in first:
            ties[name] = first[key]
        else:
            first[key] = name
    return ties


def _write(file: Any, data: Any) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view) :]

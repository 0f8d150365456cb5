"""State dicts to disk: one safetensors file, the same bytes for the same tensors and metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenization.checkpoint.safetensors import ORDER_KEY, TIES_KEY, tensor_at
from tokenization.checkpoint.tensor_file import CODES, TensorFile
from tokenization.checkpoint.weights import check_tensors
from tokenization.errors import InputError


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
        raise InputError(f"{path} has the ending {path.suffix!r}; name a file that ends in '.safetensors'")
    tensors = check_tensors(state_dict, path)
    for name, tensor in tensors.items():
        if name == "__metadata__" or tensor.dtype not in CODES:
            what = f"{tensor_at(path, name)} has dtype {tensor.dtype}"
            raise InputError(f"{what}, and safetensors cannot store its name or dtype; rename or convert it")
    all_ties = {**find_ties(tensors), **(ties or {})}
    for alias, name in all_ties.items():
        if name not in tensors or name in all_ties:
            raise InputError(
                f"{tensor_at(path, alias)} is tied to {name!r}, which is not stored; tie it to one that is"
            )
    order = [*tensors, *(alias for alias in all_ties if alias not in tensors)]
    strings = {"format": "pt", **(metadata or {}), ORDER_KEY: json.dumps(order)}  # transformers insists on the format
    if all_ties and not materialize_ties:
        strings[TIES_KEY] = json.dumps(all_ties)
    stored = {n: tensors[all_ties.get(n, n)] for n in order if materialize_ties or n not in all_ties}
    with TensorFile(path, {n: (t.dtype, tuple(t.shape)) for n, t in stored.items()}, strings) as file:
        for name in file.offsets:
            file.write(name, 0, stored[name].cpu().resolve_conj().resolve_neg())


def find_ties(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """``{alias: first name}`` of the entries that are the same memory in the same shape and dtype."""
    first: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, tensor in state_dict.items():
        if tensor.numel() == 0:
            continue
        # On the meta device no tensor has an address; Python's object of a storage stays the same while that lives.
        place = (id(tensor.untyped_storage()), tensor.storage_offset()) if tensor.is_meta else tensor.data_ptr()
        owner = first.setdefault((tensor.device, place, tensor.dtype, tensor.shape, tensor.stride()), name)
        if owner != name:
            ties[name] = owner
    return ties

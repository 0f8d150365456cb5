"""The structure of a checkpoint that exists in memory only, or nowhere yet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.safetensors import TensorInfo


def outline(state_dict: Mapping[str, Tensor], path: Path) -> Checkpoint:
    """A checkpoint's names, dtypes and shapes without values; ``path`` names it in errors.

    The tensors may be on the meta device.
    """
    tensors: dict[str, TensorInfo] = {}
    ties: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state_dict.items():
        # As `find_ties` does, but by storage: on the meta device no tensor has an address.
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
        if key in first and tensor.numel():
            ties[name] = first[key]
        else:
            first[key] = name
            tensors[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape), path, 0)
    return Checkpoint(path, tensors, ties, list(state_dict), True, {}, {})

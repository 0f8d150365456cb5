"""What all checkpoints of a zoo have in common, and the checks that a checkpoint belongs to it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint, find_ties
from tokenization.checkpoint.safetensors import tensor_at
from tokenization.errors import InputError
from tokenization.files import file_digest

_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class Structure:
    """Names, dtypes and shapes of the stored tensors in the order of the state dict, and the ties between keys.

    Attributes:
        tensors: ``{name: (dtype without "torch.", shape)}``.
        ties: ``{alias: stored name}``.
        ordered: whether the order is the state dict's own, and not that of sorted names.
    """

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    ties: dict[str, str]
    ordered: bool

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> Structure:
        """The structure of a checkpoint on disk."""
        tensors = {name: (_dtype_name(info.dtype), info.shape) for name, info in checkpoint.tensors.items()}
        return cls(tensors, dict(checkpoint.ties), checkpoint.ordered)

    @classmethod
    def of_state_dict(cls, state_dict: Mapping[str, Tensor]) -> Structure:
        """The structure that a state dict has once it is saved."""
        ties = find_ties(state_dict)
        tensors = {
            name: (_dtype_name(tensor.dtype), tuple(tensor.shape))
            for name, tensor in state_dict.items()
            if name not in ties
        }
        return cls(tensors, ties, True)

    @classmethod
    def from_json(cls, content: Any, where: str) -> Structure:
        """Read what `to_json` wrote. Raises InputError that names ``where`` if it is something else."""
        try:
            tensors = {
                str(item["name"]): (str(item["dtype"]), tuple(int(size) for size in item["shape"]))
                for item in content["tensors"]
            }
            ties = {str(alias): str(name) for alias, name in content["ties"].items()}
            return cls(tensors, ties, bool(content["ordered"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{where}: structure has a malformed entry ({error!r})"
            raise InputError(f"{what}; it needs tensors, ties and ordered, as the zoo was collected") from error

    def to_json(self) -> dict[str, Any]:
        """As plain values; the list of tensors keeps the order."""
        tensors = [{"name": n, "dtype": dtype, "shape": list(shape)} for n, (dtype, shape) in self.tensors.items()]
        return {"ordered": self.ordered, "tensors": tensors, "ties": self.ties}

    def require(self, found: Structure, where: str) -> None:
        """Check that ``found`` equals this structure.

        Raises:
            InputError: names ``where``, the first tensor that differs, and what both sides hold.
        """
        if fault := self._difference(found):
            name, what = fault
            raise InputError(
                f"{tensor_at(where, name)} {what}; a zoo holds one network structure, so leave this checkpoint out"
            )

    def _difference(self, found: Structure) -> tuple[str, str] | None:
        """The first tensor in which ``found`` differs, and how."""
        for name, (dtype, shape) in self.tensors.items():
            if name in found.ties:
                return name, f"is tied to {found.ties[name]!r}, but is a tensor of its own in the zoo"
            if name not in found.tensors:
                return name, f"is missing, but the zoo's is {dtype} of shape {list(shape)}"
            found_dtype, found_shape = found.tensors[name]
            if found_shape != shape:
                return name, f"has shape {list(found_shape)}, but the zoo's has {list(shape)}"
            if found_dtype != dtype:
                return name, f"has dtype {found_dtype}, but the zoo's has {dtype}"
        for name in found.tensors:
            if name in self.ties:
                return name, f"is a tensor of its own, but is tied to {self.ties[name]!r} in the zoo"
            if name not in self.tensors:
                return name, "is not in the zoo's structure"
        for alias in self.ties.keys() | found.ties.keys():
            if self.ties.get(alias) != found.ties.get(alias):
                return alias, f"is tied to {found.ties.get(alias)!r}, but to {self.ties.get(alias)!r} in the zoo"
        if self.ordered and found.ordered:
            for place, (expected, name) in enumerate(zip(self.tensors, found.tensors, strict=True)):
                if name != expected:
                    return name, f"is at place {place}, where the zoo has {expected!r}"
        return None


def check_values(values: Mapping[str, Tensor], where: str) -> None:
    """Check that every tensor has values, and that no float among them is NaN or infinite.

    Args:
        values: tensors of any shape by name.
        where: the file to name in an error.

    Raises:
        InputError: names the first tensor at fault.
    """
    for name, tensor in values.items():
        check_tensor_values(name, tensor, where)


def check_checkpoint_values(checkpoint: Checkpoint, where: str) -> None:
    """`check_values` of a checkpoint, one tensor at a time through the memory map."""
    for name in checkpoint.tensors:
        check_tensor_values(name, checkpoint.flat(name), where)


def check_tensor_values(name: str, tensor: Tensor, where: str) -> None:
    """`check_values` of one tensor."""
    if tensor.numel() == 0:
        what = f"{tensor_at(where, name)} has no values (shape {list(tensor.shape)})"
        raise InputError(f"{what}; remove it from the checkpoint")
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point():
        return
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK_VALUES):
        chunk = flat[start : start + _CHUNK_VALUES]
        if chunk.dtype.itemsize == 1:  # 8-bit floats have no arithmetic
            chunk = chunk.float()
        # One pass and no mask: NaN and infinities both reach the minimum or the maximum.
        if not all(bound.isfinite() for bound in torch.aminmax(chunk)):
            num_faults = int((~chunk.isfinite()).sum())
            what = f"{tensor_at(where, name)} has NaN or infinity ({num_faults} of the values from {start} on)"
            raise InputError(f"{what}; leave this checkpoint out")


def digest_of(checkpoint: Checkpoint) -> str:
    """SHA-256 (hexadecimal) of a checkpoint's file; of the shards' digests in the order of their names."""
    digests = [_digest_of_file(file) for file in sorted(checkpoint.sizes)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _digest_of_file(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise InputError(f"{path} is unreadable ({error.strerror}); make it readable or leave it out") from error


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

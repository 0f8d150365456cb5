"""What all checkpoints of a zoo have in common, checks that a checkpoint belongs to it, and masks of pruned tensors."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.safetensors import DTYPES_BY_NAME, TensorSpec, dtype_name, tensor_at
from tokenization.errors import InputError
from tokenization.files import file_digest

StateDict = Mapping[str, Tensor]
"""A network's tensors by name, as `load_state_dict` takes them."""

_CHUNK_VALUES = 1 << 22

_COUNTER = re.compile(
    r"(^|[._])(num_batches_tracked|n_averaged|updates|steps?|iter(ation)?s?|epochs?|count(er)?|calls)$"
)


@dataclass(frozen=True)
class Structure:
    """Names, dtypes and shapes of the stored tensors in the order of the state dict, and the ties between keys.

    Attributes:
        ties: ``{alias: stored name}``.
        ordered: whether the order is the state dict's own, and not that of sorted names.
        not_finite: floating tensors with NaN or infinite values, the same in every checkpoint.
    """

    tensors: dict[str, TensorSpec]
    ties: dict[str, str]
    ordered: bool
    not_finite: frozenset[str] = frozenset()

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> Structure:
        """The structure of a checkpoint on disk."""
        return cls(checkpoint.specs, dict(checkpoint.ties), checkpoint.ordered)

    @classmethod
    def of_state_dict(cls, state_dict: Mapping[str, Tensor]) -> Structure:
        """The structure that a state dict has once it is saved."""
        return cls.of_checkpoint(Checkpoint.without_values(state_dict, Path()))

    @classmethod
    def from_json(cls, content: Any, where: str) -> Structure:
        """Read what `to_json` wrote. Raises InputError that names ``where`` if it is something else."""
        try:
            tensors = {
                str(item["name"]): (DTYPES_BY_NAME[item["dtype"]], tuple(int(size) for size in item["shape"]))
                for item in content["tensors"]
            }
            ties = {str(alias): str(name) for alias, name in content["ties"].items()}
            not_finite = frozenset(item["name"] for item in content["tensors"] if not item.get("finite", True))
            return cls(tensors, ties, bool(content["ordered"]), not_finite)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{where}: structure has a malformed entry ({error!r})"
            raise InputError(f"{what}; it needs tensors, ties and ordered, as the zoo was collected") from error

    def to_json(self) -> dict[str, Any]:
        """As plain values; the list of tensors keeps the order."""
        finite = {name: {"finite": False} for name in self.not_finite}
        tensors = [
            {"name": name, "dtype": dtype_name(dtype), "shape": list(shape), **finite.get(name, {})}
            for name, (dtype, shape) in self.tensors.items()
        ]
        return {"ordered": self.ordered, "tensors": tensors, "ties": self.ties}

    def require(self, found: Structure, where: str, keys: Collection[str] = ()) -> None:
        """Check that ``found`` has the same keys, of the same dtypes and shapes, in the same order.

        Args:
            found: of another checkpoint; what it ties may be copies here, and the other way round.
            keys: further ones that ``found`` has, as copies of others.

        Raises InputError that names the file ``where``, the first tensor that differs, and what both sides hold.
        """
        if fault := self._difference(found, keys):
            name, what, cure = fault
            raise InputError(f"{tensor_at(where, name)} {what}; a zoo holds one network structure, so {cure}")

    def _difference(self, found: Structure, keys: Collection[str]) -> tuple[str, str, str] | None:
        """The first tensor in which ``found`` differs, how, and what to do about it."""
        leave = "leave this checkpoint out"
        for name in [*self.tensors, *self.ties]:
            dtype, shape = self.tensors[self.ties.get(name, name)]
            spec = found.tensors.get(found.ties.get(name, name))
            if spec is None and name in keys:
                continue
            if spec is None:
                return name, f"is missing, but the zoo's is {dtype_name(dtype)} of shape {list(shape)}", leave
            if spec[1] != shape:
                return name, f"has shape {list(spec[1])}, but the zoo's has {list(shape)}", leave
            if spec[0] != dtype:
                what = f"has dtype {dtype_name(spec[0])}, but the zoo's has {dtype_name(dtype)}"
                return name, what, "save it in that dtype, too"
        for name in [*found.tensors, *found.ties]:
            if name not in self.tensors and name not in self.ties:
                return name, "is not in the zoo's structure", leave
        if self.ordered and found.ordered:
            common = [name for name in self.tensors if name in found.tensors]
            others = [name for name in found.tensors if name in self.tensors]
            for place, (expected, name) in enumerate(zip(common, others, strict=True)):
                if name != expected:
                    return name, f"is at place {place}, where the zoo has {expected!r}", leave
        return None


def is_counter(name: str, dtype: torch.dtype, num_values: int) -> bool:
    """Whether a tensor counts steps or the like, by its name and kind: a network computes the same whatever it says."""
    is_integer = not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool
    return is_integer and num_values == 1 and _COUNTER.search(name) is not None


def num_not_finite(values: Tensor) -> int:
    """How many of some flat numbers are NaN or infinite; one pass, a chunk at a time, if there are none."""
    flat = torch.view_as_real(values).reshape(-1) if values.is_complex() else values
    faults = 0
    for start in range(0, flat.numel(), _CHUNK_VALUES):
        chunk = flat[start : start + _CHUNK_VALUES]
        if chunk.dtype.itemsize == 1:  # 8-bit floats have no arithmetic
            chunk = chunk.float()
        # No mask is made: NaN and infinities both reach the minimum or the maximum.
        if not all(bound.isfinite() for bound in torch.aminmax(chunk)):
            faults += int((~chunk.isfinite()).sum())
    return faults


def digest_of(checkpoint: Checkpoint) -> str:
    """SHA-256 (hexadecimal) of a checkpoint's file; of the shards' digests in the order of their names."""
    try:
        digests = [file_digest(file) for file in sorted(checkpoint.sizes)]
    except OSError as error:
        what = f"{error.filename} is unreadable ({error.strerror})"
        raise InputError(f"{what}; make it readable or leave it out") from error
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def bytes_of(tensor: Tensor) -> Tensor:
    """A tensor's bytes on the CPU, flat uint8; no copy of what lies there in order."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8)


def same_tensors(one: StateDict, other: StateDict) -> bool:
    """Whether two state dicts hold the same names, dtypes, shapes and bytes."""
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype
        and value.shape == other[name].shape
        and torch.equal(bytes_of(value), bytes_of(other[name]))
        for name, value in one.items()
    )


def fits(name: str, pattern: str, known: Container[str]) -> bool:
    """Whether a pattern means a tensor: the pattern is a glob, unless it is the very name of a ``known`` tensor.

    Names may hold brackets, ``layers[0].weight``, which as a glob is ``layers0.weight``.
    """
    return name == pattern if pattern in known else fnmatchcase(name, pattern)


SUFFIXES: dict[str, tuple[str, ...]] = {
    "mask": ("_orig", "_mask"),
    "zeros": ("",),
    "csr": ("_crow_indices", "_col_indices", "_values", "_shape"),
    "int8": ("", "_scale"),
    "int4": ("_packed", "_scale", "_shape"),
}
"""What a weight's name is followed by in the names of what is stored of it."""


def cut_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Which weights live, bool in the shape of ``scores``: those of the highest scores, of equal ones the earlier.

    Args:
        sparsity: share of weights that are zero, 0 … 1; their number is rounded. Raises InputError for others.
    """
    if not 0 <= sparsity <= 1:
        raise InputError(f"sparsity is {sparsity}, but it is a share of zeros; give one of 0 to 1")
    alive = scores.numel() - round(sparsity * scores.numel())
    mask = torch.zeros_like(scores, dtype=torch.bool).flatten()
    mask[scores.flatten().argsort(descending=True, stable=True)[:alive]] = True
    return mask.view_as(scores)


def share_out(total: int, shares: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """``total`` living weights among tensors, in proportion to their shares, none above its size.

    Args:
        shares: of each tensor, above 0; what does not fit into one goes to the others.
        sizes: values of each tensor, of a sum of ``total`` or more.

    Returns:
        whole numbers that sum to ``total``; largest remainders are rounded up.
    """
    weights, room = (torch.tensor(each, dtype=torch.float64) for each in (shares, sizes))
    counts = torch.zeros_like(room)
    for _ in sizes:
        open_shares = torch.where(counts < room, weights, 0.0)
        counts += open_shares / open_shares.sum().clamp(min=1e-300) * (total - counts.sum())
        counts = counts.minimum(room)
    whole = (counts + 1e-9).floor()
    order = (counts - whole).argsort(descending=True, stable=True)
    whole[order[: total - int(whole.sum())]] += 1
    return [int(count) for count in whole.tolist()]

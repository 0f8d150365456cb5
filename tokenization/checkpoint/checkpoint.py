"""One checkpoint on disk: opened lazily by memory map, checked before use, saved atomically. What it has in common with
others of a zoo.

It is a safetensors file, a sharded one with its index, or a folder that holds either (a PEFT adapter, a timm or
transformers ``save_pretrained`` folder). Pickles are for `read_state_dict` alone, to be converted once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenization.checkpoint.pickles import load_inert, pickled_files
from tokenization.checkpoint.safetensors import (
    DTYPES_BY_NAME,
    ORDER_KEY,
    TIES_KEY,
    TensorInfo,
    TensorSpec,
    dtype_name,
    locate,
    order_of,
    read_header,
    tensor_at,
    ties_of,
)
from tokenization.checkpoint.tensor_file import find_ties
from tokenization.checkpoint.tensor_file import save_checkpoint as save_checkpoint
from tokenization.checkpoint.weights import AS_FOUND, Chosen, Weights, plain_names, weights_in
from tokenization.errors import InputError
from tokenization.files import drop_pages, file_digest

StateDict = Mapping[str, Tensor]
"""A network's tensors by name, as `load_state_dict` takes them."""

_CHUNK_VALUES = 1 << 22

_COUNTER = re.compile(
    r"(^|[._])(num_batches_tracked|n_averaged|updates|steps?|iter(ation)?s?|epochs?|count(er)?|calls)$"
)


@dataclass(eq=False, repr=False)
class Checkpoint:
    """A checkpoint whose values stay on disk until they are asked for.

    Safe to use across ``fork`` and to pickle: a copy in another process maps the files again when it first reads.

    Attributes:
        path: what was opened: a file or a folder.
        tensors: the stored tensors in the order of the state dict.
        ties: ``{alias: stored name}``; an alias is a key of the state dict but not of ``tensors``.
        order: every key of the state dict, aliases included.
        ordered: whether the file records that order; without it names are sorted, ``block.2`` before ``block.10``.
        metadata: the strings in the header, ``rpg.order`` and ``rpg.ties`` left out.
        sizes: bytes of each file the values lie in.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    ties: dict[str, str]
    order: list[str]
    ordered: bool
    metadata: dict[str, str]
    sizes: dict[Path, int]
    _maps: dict[Path, Tensor] = field(default_factory=dict, init=False)

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Read and check the header(s); no values are read.

        Raises InputError if there is no checkpoint, or it is truncated, inconsistent, or of an unknown dtype.
        """
        path = Path(path)
        try:
            header = read_header(locate(path))
        except InputError as error:
            if pickled := pickled_files(path):
                what = f"{pickled[0]} is a pickle, which cannot be read in parts"
                raise InputError(f"{what}; convert it once with `rpg collect --from`") from error
            raise
        if not header.tensors:
            raise InputError(f"{path} has no tensor; name a checkpoint")
        ties = ties_of(header, path)
        order, ordered = order_of(header, ties, path)
        tensors = {name: header.tensors[name] for name in order if name in header.tensors}
        metadata = {key: text for key, text in header.metadata.items() if key not in (ORDER_KEY, TIES_KEY)}
        return cls(path, tensors, ties, order, ordered, metadata, header.sizes)

    @classmethod
    def without_values(cls, state_dict: Mapping[str, Tensor], path: Path) -> Checkpoint:
        """Names, dtypes, shapes and ties of a state dict (on the meta device, too): its values cannot be read."""
        ties = find_ties(state_dict)
        tensors = {
            name: TensorInfo(name, tensor.dtype, tuple(tensor.shape), path, 0)
            for name, tensor in state_dict.items()
            if name not in ties
        }
        return cls(path, tensors, ties, list(state_dict), True, {}, {})

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of each stored tensor."""
        return {name: info.spec for name, info in self.tensors.items()}

    def arranged(self, ties: Mapping[str, str], not_finite: Collection[str] = ()) -> Checkpoint:
        """The same with the ties ``{alias: stored name}`` alone: copies are dropped, what was left out is put in.

        ``not_finite`` are tensors known to hold NaN or infinite values.
        """
        order = [*self.order, *(alias for alias in ties if alias not in self.order)]
        order += [name for name in dict.fromkeys(ties.values()) if name not in order]
        owner = {name: alias for alias, name in ties.items() if name not in self.order and alias in self.order}
        tensors = {
            name: replace(self.info(owner.get(name, name)), name=name, finite=name not in not_finite)
            for name in order
            if name not in ties
        }
        return replace(self, tensors=tensors, ties=dict(ties), order=order)

    def flat(self, name: str) -> Tensor:
        """All values of a tensor, ``[num_values]`` of the stored dtype, in the private memory map: no copy is made."""
        info = self.info(name)
        data = self._map(info.file)[info.offset : info.offset + info.num_bytes]
        if info.offset % info.dtype.itemsize:  # only foreign writers leave tensors unaligned
            data = data.clone()
        return data.view(info.dtype)

    def tensor(self, name: str) -> Tensor:
        """A copy of a tensor in its shape."""
        return self.flat(name).clone().reshape(self.info(name).shape)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all tensors under every key; an alias is the very tensor object it is tied to."""
        stored = {name: self.tensor(name) for name in self.tensors}
        return {name: stored[self.ties.get(name, name)] for name in self.order}

    def load(self) -> dict[str, Tensor]:
        """`state_dict`, and no page of the file in this process any longer."""
        state_dict = self.state_dict()
        for name in self.tensors:
            self.release(name)
        return state_dict

    def release(self, name: str, first: int = 0, last: int | None = None) -> None:
        """Drop the pages of values ``[first, last)`` from this process, where it can; reading maps them again."""
        info = self.tensors[name]
        if info.offset % info.dtype.itemsize:  # an unaligned tensor is a copy, not the map
            return
        part = self.flat(name)[first:last]
        mapped = self._map(info.file)
        drop_pages(mapped.data_ptr(), self.sizes[info.file], part.data_ptr(), part.nbytes)

    def require(self, specs: Mapping[str, TensorSpec]) -> None:
        """Check that there are tensors of these dtypes and shapes. Raises InputError that names the first at fault."""
        for name, (dtype, shape) in specs.items():
            info = self.tensors.get(name)
            found = "missing" if info is None else f"{info.dtype} of shape {list(info.shape)}"
            if info is None or info.spec != (dtype, shape):
                what = f"{tensor_at(self.path, name)} is {found}, but should be {dtype} of shape {list(shape)}"
                raise InputError(f"{what}; copy the file again")

    def info(self, name: str) -> TensorInfo:
        """Where a tensor (or the one an alias is tied to) lies. Raises InputError when there is none of the name."""
        info = self.tensors.get(self.ties.get(name, name))
        if info is None:
            raise InputError(f"{tensor_at(self.path, name)} does not exist; use one of the checkpoint's own names")
        return info

    def _map(self, file: Path) -> Tensor:
        if file not in self._maps:
            size = self.sizes[file]
            try:
                found = file.stat().st_size
                if found != size:
                    raise InputError(f"{file} has {found} bytes, but had {size} when it was opened; open it again")
                # A private map: no file descriptor is kept, so that a zoo may hold thousands of files open.
                storage = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=size)
            except (OSError, RuntimeError) as error:
                raise InputError(f"{file} is no longer readable ({error}); put it back") from error
            self._maps[file] = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
        return self._maps[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self.tensors)} tensors)"


def read_state_dict(path: Path | str, chosen: Chosen = AS_FOUND) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of any kind, pickles included, in the order of its state dict: `read_weights`."""
    return read_weights(path, chosen).tensors


def read_weights(path: Path | str, chosen: Chosen = AS_FOUND) -> Weights:
    """The weights in a checkpoint of any kind, named as in the plain network, and what was passed over.

    Args:
        path: safetensors, a pickle, shards of either, or a folder that holds one.

    Raises:
        NoWeightsError: it is read and holds no weights.
        InputError: there is no checkpoint, a broken one, one of another program, several sets of weights and none
            chosen, or a pickle that holds code, which is not run.
    """
    path = Path(path)
    if pickled := pickled_files(path):
        parts = [weights_in(load_inert(file), file, chosen.key) for file in pickled]
        tensors = {name: value for part in parts for name, value in part.tensors.items()}
        notes = [note for part in parts for note in part.notes]
    else:
        tensors, notes = Checkpoint.open(path).state_dict(), []
    renamed = plain_names(list(tensors), path, chosen, {name: tuple(value.shape) for name, value in tensors.items()})
    named = {text: tensors[name] for name, text in renamed.names.items()}
    return Weights(named, list(dict.fromkeys([*notes, *renamed.notes])))


def has_plain_names(checkpoint: Checkpoint, chosen: Chosen) -> bool:
    """Whether a safetensors checkpoint can stay as it is. Raises InputError as `plain_names` does."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return plain_names(checkpoint.order, checkpoint.path, chosen, shapes).same


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

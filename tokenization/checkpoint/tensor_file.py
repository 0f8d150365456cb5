"""Write safetensors files: piece by piece in any order, or a whole state dict with its ties."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from tokenization.checkpoint.safetensors import CODES, ORDER_KEY, TIES_KEY, TensorSpec, tensor_at
from tokenization.checkpoint.weights import check_tensors
from tokenization.errors import InputError
from tokenization.files import synchronise, temporary_name, writing_failed


def header_of(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Lay out a safetensors file: its first bytes (length and header), each tensor's offset and its size in bytes.

    The library's own writer puts the metadata in random order; here the same input gives the same bytes. Wider dtypes
    come first, so that every tensor is aligned; within a dtype the order is kept.
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offsets: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in sorted(specs.items(), key=lambda item: -item[1][0].itemsize):
        offsets[name] = end
        end += math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {name: start + offset for name, offset in offsets.items()}
    return len(text).to_bytes(8, "little") + text, places, start + end


class Closing(ABC):
    """A context manager that is closed after its block, and aborted after an error in it."""

    @abstractmethod
    def close(self) -> None:
        """Put in place what was written."""

    @abstractmethod
    def abort(self) -> None:
        """Drop all that was written. Harmless when repeated."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close() if kind is None else self.abort()


class TensorFile(Closing):
    """A safetensors file of tensors known by dtype and shape, filled through ``write`` and put in place by ``close``.

    Until then it has a temporary name, which goes when the object is dropped, aborted, or left with an error as a
    context manager. A copy in another process, forked or pickled, writes into the same file; the process that made
    it puts it in place or removes it.

    Args:
        path: the file, replaced on ``close`` if it exists.
        num_extra_bytes: room for the caller's own notes after the tensors, cut off on ``close``.
        reserve: take the space now, so that a full disk is known before hours of sampling, not after.

    Raises:
        InputError: here and from every method: the disk is full or refuses. Nothing is left behind then.
    """

    _descriptor = -1

    def __init__(
        self,
        path: Path | str,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str] | None = None,
        num_extra_bytes: int = 0,
        *,
        reserve: bool = True,
    ) -> None:
        self.path = Path(path)
        self.process = os.getpid()
        self.temporary = temporary_name(self.path)
        header, self.offsets, self.size = header_of(specs, metadata or {})
        with self._abort_on_error():
            if self.path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "there is a folder of this name")
            self._descriptor = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            _set_size(self._descriptor, self.size + num_extra_bytes, reserve)
        self.write_bytes(header, 0)

    @property
    def is_owner(self) -> bool:
        """Whether this process made the file and it is neither in place nor aborted."""
        return self._descriptor >= 0 and self.process == os.getpid()

    def write(self, name: str, first: int, values: Tensor) -> None:
        """Put values (CPU, of the tensor's dtype) at place ``first`` of the flattened tensor ``name``."""
        if not values.numel():
            return
        offset = self.offsets[name] + first * values.dtype.itemsize
        self.write_bytes(values.contiguous().reshape(-1).view(torch.uint8).numpy().data, offset)

    def write_bytes(self, data: bytes | memoryview, offset: int) -> None:
        """Put bytes at a byte of the file."""
        view = memoryview(data)
        with self._abort_on_error():
            while len(view):
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written

    def read_extra(self) -> bytes:
        """The caller's notes."""
        with self._abort_on_error():
            return os.pread(self._descriptor, os.fstat(self._descriptor).st_size - self.size, self.size)

    def close(self) -> None:
        """Put the file in place; in a copy in another process, only stop writing. Harmless when repeated."""
        if self._descriptor < 0:
            return
        with self._abort_on_error():
            if self.is_owner:
                os.ftruncate(self._descriptor, self.size)
                os.fsync(self._descriptor)  # some disks report only here that they are full
                os.replace(self.temporary, self.path)
                synchronise(self.path.parent)
        os.close(self._descriptor)
        self._descriptor = -1

    def abort(self) -> None:
        """Remove the temporary file. Harmless when repeated or after ``close``."""
        if self._descriptor < 0:
            return
        if self.is_owner:
            with contextlib.suppress(OSError):
                self.temporary.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1

    @contextlib.contextmanager
    def _abort_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.abort()
            raise writing_failed(self.path, error) from error

    def __del__(self) -> None:
        self.abort()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_descriptor"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._descriptor = os.open(self.temporary, os.O_RDWR)


def _set_size(descriptor: int, size: int, reserve: bool) -> None:
    try:
        if reserve:
            os.posix_fallocate(descriptor, 0, size)
            return
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
    os.ftruncate(descriptor, size)


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
        ties: ``{alias: stored name}`` in addition to those found: keys whose tensors are the same memory.
        materialize_ties: store aliases as copies instead, so that any loader finds every key in the file.

    Raises InputError if a tensor cannot be stored, a tie is wrong, or the disk refuses; ``path`` is then as it was.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path} has the suffix {path.suffix!r}; name a file that ends in '.safetensors'")
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

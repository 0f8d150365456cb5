"""Write safetensors files piece by piece, in any order, without ever holding one in memory."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tokenization.checkpoint.safetensors import ORDER_KEY
from tokenization.checkpoint.saving import header_of
from tokenization.files import TEMPORARY_SUFFIX, synchronise, writing_failed
from tokenization.layout.placement import BLOCK_VALUES

if TYPE_CHECKING:
    from tokenization.layout.layout import TokenLayout

TensorSpec = tuple[torch.dtype, tuple[int, ...]]


class TensorFile:
    """A safetensors file of tensors known by dtype and shape, filled through ``write`` and published by ``close``.

    Until then it has a temporary name, which goes when the object is dropped, aborted, or left with an error as a
    context manager. A copy in another process, forked or pickled, writes into the same file; the process that made
    it publishes or removes it.

    Args:
        path: the file, replaced on ``close`` if it exists.
        specs: dtype and shape of every tensor.
        metadata: strings for the header.
        num_extra_bytes: room for the caller's own notes after the tensors, cut off on ``close``.

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
    ) -> None:
        self.path = Path(path)
        self.process = os.getpid()
        self.temporary = self.path.with_name(f".{self.path.name}.{self.process}{TEMPORARY_SUFFIX}")
        header, self.offsets, self.size = header_of(specs, metadata or {})
        with self._abort_on_error():
            if self.path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "there is a folder of this name")
            self._descriptor = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            _reserve(self._descriptor, self.size + num_extra_bytes)
        self.write_bytes(header, 0)

    @property
    def is_owner(self) -> bool:
        """Whether this process made the file and it is neither published nor aborted."""
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
        """Publish the file; in a copy in another process, only stop writing. Harmless when repeated."""
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

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close() if error is None else self.abort()

    def __del__(self) -> None:
        self.abort()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_descriptor"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._descriptor = os.open(self.temporary, os.O_RDWR)


class CheckpointWriter:
    """Streams tokens, denormalised, to their places in one safetensors file, and publishes it on ``close``.

    Rows may come in any order and from several processes (send each a pickled copy). Every key of the state dict is
    in the file, tied ones as copies, so that ``load_state_dict(strict=True)`` takes it as it is.

    Args:
        path: the file.
        layout: a fitted layout.
        metadata: strings for the header; ``format: pt`` is added, which transformers asks for.

    Raises:
        InputError: the disk is full or refuses; nothing is left behind.
    """

    def __init__(self, path: Path | str, layout: TokenLayout, metadata: Mapping[str, str] | None = None) -> None:
        self.layout = layout
        self._copies: dict[str, list[str]] = {layer.name: [layer.name] for layer in layout.layers}
        for alias, name in layout.ties.items():
            self._copies.setdefault(name, [name]).append(alias)
        specs = {name: layout.spec(name) for name in layout.names}
        metadata = {"format": "pt", **(metadata or {}), ORDER_KEY: json.dumps(list(layout.names))}
        # One byte a token after the tensors says that it has been written, whichever process did.
        self._file = TensorFile(path, specs, metadata, num_extra_bytes=layout.num_tokens)
        for name in layout.constant_specs:
            self._put(name, 0, layout.constant(name))

    def write(self, first_token: int, rows: Tensor) -> None:
        """Write tokens ``first_token …``.

        Args:
            rows: ``[n, D]``, any float dtype and device; padding is ignored.

        Raises:
            ValueError: the rows do not fit into ``[L, D]``.
        """
        layout = self.layout
        fits = rows.dim() == 2 and rows.shape[1] == layout.token_size
        if not fits or not 0 <= first_token <= layout.num_tokens - len(rows):
            raise ValueError(
                f"rows of tokens {first_token} …: found shape {list(rows.shape)}, expected "
                f"[up to {layout.num_tokens - first_token}, {layout.token_size}]"
            )
        values = rows.detach().cpu().contiguous().reshape(-1)
        token_ids = np.arange(first_token, first_token + len(rows))
        for index, source, place, length in layout.runs.pieces(token_ids).merged(layout.token_size):
            layer = layout.layers[index]
            transform = layout.layer_statistics(index)
            part = torch.empty(length, dtype=layer.dtype)
            for begin in range(0, length, BLOCK_VALUES):
                end = min(begin + BLOCK_VALUES, length)
                centre = transform.centre_at(slice(source + begin, source + end))
                part[begin:end] = transform.denormalize(values[place + begin : place + end], centre)
            self._put(layer.name, source, part)
            layout.statistics.release(layer.name)
        self._file.write_bytes(b"\1" * len(rows), self._file.size + first_token)

    def close(self) -> None:
        """Publish the file; in another process's copy, only stop writing.

        Raises:
            ValueError: a token was never written (the file is then abandoned).
        """
        if self._file.is_owner:
            missing = self._file.read_extra().find(b"\0")
            if missing >= 0:
                self._file.abort()
                raise ValueError(f"{self._file.path}: token {missing} of {self.layout.num_tokens} was never written")
        self._file.close()

    def abort(self) -> None:
        """Drop all that was written. Harmless when repeated."""
        self._file.abort()

    def _put(self, name: str, first: int, values: Tensor) -> None:
        for copy in self._copies.get(name, [name]):
            self._file.write(copy, first, values)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close() if error is None else self.abort()


def _reserve(descriptor: int, size: int) -> None:
    """Take the space now, so that a full disk is known before hours of sampling, not after."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.ftruncate(descriptor, size)

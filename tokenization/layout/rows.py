"""Rows of tokens: read from a zoo, if it is small from memory, and written straight into one file.

Letters: B checkpoints, L tokens of each, N chosen tokens, D token width."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.safetensors import ORDER_KEY
from tokenization.checkpoint.tensor_file import Closing, TensorFile
from tokenization.files import empty_huge
from tokenization.layout.description import LayoutDescription
from tokenization.layout.layout import TokenLayout
from tokenization.layout.normalization import LayerStatistics
from tokenization.layout.placement import BLOCK_VALUES, as_reals, rounded
from tokenization.zoo.zoo import Zoo

LONG_STRETCH = 4096
"""Values from which on a stretch is copied on its own; many shorter ones are gathered at once."""

Ids = Tensor | Sequence[int]
Group = tuple[int, int, int, np.ndarray, np.ndarray]


def read_rows(layout: LayoutDescription, zoo: Zoo, checkpoint_ids: Ids, token_ids: Ids) -> Tensor:
    """Normalised rows ``[B, N, D]`` without touching the rest; arguments and errors as `TokenReader.read`'s."""
    checkpoints, tokens = checked_ids(layout, len(zoo), checkpoint_ids, token_ids)
    rows = empty_huge((*tokens.shape, layout.token_size), torch.float32)
    partial = layout.runs.num_values(tokens.reshape(-1)) < layout.token_size
    rows.view(-1, layout.token_size)[torch.from_numpy(np.flatnonzero(partial))] = 0
    groups: list[Group] = []
    for place, number in enumerate(checkpoints.tolist()):
        if place == 0 or not np.array_equal(tokens[place], tokens[place - 1]):
            groups = layout.runs.pieces(tokens[place]).groups()
        checkpoint = layout.checkpoint(zoo, number)
        for group in groups:
            _read_group(layout, rows[place], checkpoint, group)
    return rows


def values_of(
    layout: LayoutDescription, first_token: int, rows: Tensor, *, exact: bool = True
) -> Iterator[tuple[str, int, Tensor]]:
    """The values that tokens ``first_token …`` stand for, stretch by stretch.

    Args:
        rows: ``[n, D]``, any float dtype and device; padding is ignored.
        exact: denormalise in float64, as ``decode`` does; in float32 otherwise, several times as fast.

    Yields:
        a layer's name, the place of the first value in the flattened layer, and values ``[m]`` in the stored dtype.
    """
    values = rows.detach().cpu().contiguous().reshape(-1)
    token_ids = np.arange(first_token, first_token + len(rows))
    for index, source, place, length in layout.runs.pieces(token_ids).merged(layout.token_size):
        layer = layout.layers[index]
        transform = layout.layer_statistics(index)
        denormalize = transform.denormalize if exact else transform.denormalize_as
        part = torch.empty(length, dtype=layer.real_dtype)
        for begin in range(0, length, BLOCK_VALUES):
            end = min(begin + BLOCK_VALUES, length)
            centre = transform.centre_at(slice(source + begin, source + end))
            part[begin:end] = rounded(denormalize(values[place + begin : place + end], centre), part.dtype)
        yield layer.name, source, part
        layout.statistics.release(layer.name)


def checked_ids(
    layout: LayoutDescription, num_checkpoints: int, checkpoint_ids: Ids, token_ids: Ids
) -> tuple[np.ndarray, np.ndarray]:
    """The ids as arrays ``[B]`` and ``[B, N]``. Raises IndexError for an id out of range."""
    checkpoints = np.asarray(torch.as_tensor(checkpoint_ids, device="cpu"), dtype=np.int64).reshape(-1)
    tokens = np.asarray(torch.as_tensor(token_ids, device="cpu"), dtype=np.int64)
    _require_range("checkpoint", checkpoints, num_checkpoints)
    _require_range("token", tokens, layout.num_tokens)
    if tokens.ndim not in (1, 2) or (tokens.ndim == 2 and len(tokens) != len(checkpoints)):
        raise IndexError(f"token_ids of shape {tokens.shape} must be [N] or [{len(checkpoints)}, N]")
    return checkpoints, np.broadcast_to(tokens, (len(checkpoints), tokens.shape[-1]))


def _read_group(layout: LayoutDescription, rows: Tensor, checkpoint: Checkpoint, group: Group) -> None:
    """Fill ``rows`` ``[N, D]`` with stretches of one layer that have one length and one place in their tokens."""
    index, target, length, row_ids, sources = group
    layer = layout.layers[index]
    statistics = layout.layer_statistics(index)
    flat, into = as_reals(checkpoint.flat(layer.name)), rows[:, target : target + length]
    if length >= LONG_STRETCH:
        for row, source in zip(row_ids.tolist(), sources.tolist(), strict=True):
            where = slice(source, source + length)
            into[row] = statistics.normalize(flat[where], statistics.centre_at(where))
    else:
        _gather(into, flat, statistics, row_ids, sources)
    # A page is mapped together with its neighbours: without this, resident memory would grow to the zoo's size.
    checkpoint.release(layer.name)
    layout.statistics.release(layer.name)


def _gather(into: Tensor, flat: Tensor, statistics: LayerStatistics, row_ids: np.ndarray, sources: np.ndarray) -> None:
    """Normalise stretches of one layer, from ``sources`` on, into the rows ``row_ids`` of ``into`` ``[N, length]``."""
    length = into.shape[1]
    stretches = _stretches(flat, length)
    centres = _stretches(statistics.centre, length) if isinstance(statistics.centre, Tensor) else None
    step = max(1, BLOCK_VALUES // length)
    for first in range(0, len(row_ids), step):
        source = torch.from_numpy(sources[first : first + step])
        centre = statistics.centre if centres is None else centres[source]
        values = statistics.normalize(stretches[source], centre)
        into[torch.from_numpy(row_ids[first : first + step])] = values.to(into.dtype)


def _stretches(flat: Tensor, length: int) -> Tensor:
    """All stretches of ``length`` values as overlapping rows of a view, ``[len(flat) - length + 1, length]``."""
    return flat.as_strided((len(flat) - length + 1, length), (1, 1))


def _require_range(what: str, ids: np.ndarray, count: int) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= count):
        raise IndexError(f"{what}_ids {ids.min()} to {ids.max()} must lie in 0 to {count - 1}")


CACHE_BYTES = 256 << 20
"""The most memory that encoded checkpoints take unless told otherwise."""


class TokenReader:
    """Reads rows of the normalised tokens of a zoo.

    A zoo whose tokens fit into the cache is encoded once, checkpoint by checkpoint as they are asked for. Of a larger
    one only the rows asked for are read, straight from the memory-mapped checkpoints; resident memory stays bounded.
    Thread-safe, fork-safe and picklable (a pickled copy opens the zoo again).
    """

    def __init__(self, zoo: Zoo, layout: TokenLayout, cache_bytes: int = CACHE_BYTES) -> None:
        self.zoo = zoo
        self.layout = layout
        self.cache_bytes = cache_bytes
        shape = (len(zoo), layout.num_tokens, layout.token_size)
        fits = self.cached_bytes(len(zoo), layout, cache_bytes) > 0
        self._cache = torch.empty(shape) if fits else None
        self._cached: set[int] = set()
        self._lock = threading.Lock()

    @staticmethod
    def cached_bytes(num_checkpoints: int, layout: TokenLayout, cache_bytes: int = CACHE_BYTES) -> int:
        """Bytes that the encoded checkpoints take where they are kept in memory; 0 where they are too many."""
        num_bytes = 4 * num_checkpoints * layout.num_tokens * layout.token_size
        return num_bytes if num_bytes <= cache_bytes else 0

    def read(self, checkpoint_ids: Ids, token_ids: Ids) -> Tensor:
        """Normalised rows ``[B, N, D]`` float32, equal to those of ``encode``; padding is 0.

        Args:
            checkpoint_ids: entries of the zoo, ``[B]``.
            token_ids: tokens of each, ``[N]``, or of each its own, ``[B, N]``.

        Raises:
            IndexError: an id out of range.
            InputError: a checkpoint is broken.
        """
        if self._cache is None:
            return read_rows(self.layout, self.zoo, checkpoint_ids, token_ids)
        checkpoints, tokens = checked_ids(self.layout, len(self.zoo), checkpoint_ids, token_ids)
        rows = empty_huge((*tokens.shape, self.layout.token_size), torch.float32)
        for place, (number, ids) in enumerate(zip(checkpoints.tolist(), tokens, strict=True)):
            torch.index_select(self._encoded(number), 0, torch.tensor(ids), out=rows[place])
        return rows

    def _encoded(self, checkpoint_id: int) -> Tensor:
        assert self._cache is not None
        with self._lock:
            if checkpoint_id not in self._cached:
                source = self.layout.checkpoint(self.zoo, checkpoint_id)
                self.layout.encode_into(self._cache[checkpoint_id], source)
                self._cached.add(checkpoint_id)
        return self._cache[checkpoint_id]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.zoo.path, "layout": self.layout, "cache_bytes": self.cache_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        path: Path = state["path"]
        self.__init__(Zoo.open(path), state["layout"], state["cache_bytes"])  # type: ignore[misc]


class CheckpointWriter(Closing):
    """Streams tokens, denormalised, to their places in one safetensors file, and puts it in place on ``close``.

    Rows may come in any order and from several processes (send each a pickled copy). Every key of the state dict is
    in the file, tied ones as copies, so that ``load_state_dict(strict=True)`` takes it as it is. The header gets
    ``metadata`` and ``format: pt``, which transformers asks for.

    Raises InputError if the disk is full or refuses; nothing is left behind.
    """

    def __init__(
        self,
        path: Path | str,
        layout: LayoutDescription,
        metadata: Mapping[str, str] | None = None,
        *,
        exact: bool = True,
    ) -> None:
        self.layout = layout
        self.exact = exact
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
        """Write tokens ``first_token …``, ``[n, D]`` of any float dtype. Raises ValueError if they do not fit."""
        layout = self.layout
        fits = rows.dim() == 2 and rows.shape[1] == layout.token_size
        if not fits or not 0 <= first_token <= layout.num_tokens - len(rows):
            raise ValueError(
                f"rows from token {first_token} on have shape {list(rows.shape)}, which must be "
                f"[up to {layout.num_tokens - first_token}, {layout.token_size}]"
            )
        for name, first, values in values_of(layout, first_token, rows, exact=self.exact):
            self._put(name, first, values)
        self._file.write_bytes(b"\1" * len(rows), self._file.size + first_token)

    def close(self) -> None:
        """Put the file in place; in another process's copy, only stop writing.

        Raises ValueError, and abandons the file, if a token was never written.
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

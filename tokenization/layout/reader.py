"""Random access to the tokens of a zoo: only the rows that are asked for are read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.layout.placement import BLOCK_VALUES
from tokenization.pages import empty_huge, release_pages
from tokenization.zoo.zoo import Zoo

if TYPE_CHECKING:
    from tokenization.layout.layout import TokenLayout
    from tokenization.layout.normalization import LayerStatistics

LONG_STRETCH = 4096
"""Values from which on a stretch is copied on its own; many shorter ones are gathered at once."""

CACHE_BYTES = 256 << 20
"""The most memory that encoded checkpoints take unless told otherwise."""

Group = tuple[int, int, int, np.ndarray, np.ndarray]


class TokenReader:
    """Reads rows of the normalised tokens of a zoo.

    A zoo whose tokens fit into the cache is encoded once, checkpoint by checkpoint as they are asked for. Of a larger
    one only the rows asked for are read, straight from the memory-mapped checkpoints; resident memory stays bounded.
    Thread-safe, fork-safe and picklable (a pickled copy opens the zoo again).

    Args:
        zoo: the checkpoints.
        layout: their layout, fitted.
        cache_bytes: the most memory that encoded checkpoints may take.
    """

    def __init__(self, zoo: Zoo, layout: TokenLayout, cache_bytes: int = CACHE_BYTES) -> None:
        self.zoo = zoo
        self.layout = layout
        self.cache_bytes = cache_bytes
        self._start()

    def _start(self) -> None:
        shape = (len(self.zoo), self.layout.num_tokens, self.layout.token_size)
        fits = self.cached_bytes(len(self.zoo), self.layout, self.cache_bytes) > 0
        self._cache = torch.empty(shape) if fits else None
        self._cached: set[int] = set()
        self._lock = threading.Lock()

    @staticmethod
    def cached_bytes(num_checkpoints: int, layout: TokenLayout, cache_bytes: int = CACHE_BYTES) -> int:
        """Bytes that the encoded checkpoints take where they are kept in memory; 0 where they are too many."""
        num_bytes = 4 * num_checkpoints * layout.num_tokens * layout.token_size
        return num_bytes if num_bytes <= cache_bytes else 0

    def read(self, checkpoint_ids: Tensor | Sequence[int], token_ids: Tensor | Sequence[int]) -> Tensor:
        """Normalised rows, equal to those of ``encode``.

        Args:
            checkpoint_ids: entries of the zoo, ``[B]``.
            token_ids: tokens of each, ``[N]``, or of each its own, ``[B, N]``.

        Returns:
            ``[B, N, D]`` float32; padding is 0.

        Raises:
            IndexError: an id out of range.
            InputError: a checkpoint is broken.
        """
        checkpoints = np.asarray(torch.as_tensor(checkpoint_ids, device="cpu"), dtype=np.int64).reshape(-1)
        tokens = np.asarray(torch.as_tensor(token_ids, device="cpu"), dtype=np.int64)
        _require_range("checkpoint", checkpoints, len(self.zoo))
        _require_range("token", tokens, self.layout.num_tokens)
        if tokens.ndim not in (1, 2) or (tokens.ndim == 2 and len(tokens) != len(checkpoints)):
            raise IndexError(f"token_ids: found shape {tokens.shape}, expected [N] or [{len(checkpoints)}, N]")
        per_checkpoint = np.broadcast_to(tokens, (len(checkpoints), tokens.shape[-1]))
        rows = empty_huge((*per_checkpoint.shape, self.layout.token_size), torch.float32)
        if self._cache is not None:
            for place, (number, ids) in enumerate(zip(checkpoints.tolist(), per_checkpoint, strict=True)):
                torch.index_select(self._encoded(number), 0, torch.tensor(ids), out=rows[place])
            return rows
        self._clear_padding(rows.view(-1, self.layout.token_size), per_checkpoint.reshape(-1))
        groups = [self._groups(ids) for ids in (per_checkpoint if tokens.ndim == 2 else [tokens])]
        for place, number in enumerate(checkpoints.tolist()):
            checkpoint = self.layout.checkpoint(self.zoo, number)
            for group in groups[place if tokens.ndim == 2 else 0]:
                self._read_group(rows[place], checkpoint, group)
        return rows

    def _encoded(self, checkpoint_id: int) -> Tensor:
        assert self._cache is not None
        with self._lock:
            if checkpoint_id not in self._cached:
                source = self.layout.checkpoint(self.zoo, checkpoint_id)
                self.layout.encode_into(self._cache[checkpoint_id], source)
                self._cached.add(checkpoint_id)
        return self._cache[checkpoint_id]

    def _groups(self, token_ids: np.ndarray) -> list[Group]:
        return self.layout.runs.pieces(token_ids).groups()

    def _clear_padding(self, rows: Tensor, token_ids: np.ndarray) -> None:
        partial = np.flatnonzero(self.layout.runs.num_values(token_ids) < self.layout.token_size)
        rows[torch.from_numpy(partial)] = 0

    def _read_group(self, rows: Tensor, checkpoint: Checkpoint, group: Group) -> None:
        """Fill ``rows`` ``[N, D]`` with stretches of one layer that have one length and one place in their tokens."""
        index, target, length, row_ids, sources = group
        layer = self.layout.layers[index]
        statistics = self.layout.layer_statistics(index)
        flat, into = checkpoint.flat(layer.name), rows[:, target : target + length]
        if length >= LONG_STRETCH:
            for row, source in zip(row_ids.tolist(), sources.tolist(), strict=True):
                where = slice(source, source + length)
                into[row] = statistics.normalize(flat[where], statistics.centre_at(where))
        else:
            _gather(into, flat, statistics, row_ids, sources)
        # A page is mapped together with its neighbours: without this, resident memory would grow to the zoo's size.
        release_pages(checkpoint, layer.name)
        self.layout.statistics.release(layer.name)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.zoo.path, "layout": self.layout, "cache_bytes": self.cache_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        path: Path = state["path"]
        self.__init__(Zoo.open(path), state["layout"], state["cache_bytes"])  # type: ignore[misc]


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
        raise IndexError(f"{what}_ids: found {ids.min()} to {ids.max()}, expected 0 to {count - 1}")

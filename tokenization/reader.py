"""Random access to the tokens of a zoo: only the rows that are asked for are read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tokenization.pages import release_pages
from tokenization.plan import BLOCK_VALUES
from tokenization.zoo import Zoo

if TYPE_CHECKING:
    from tokenization.layout import TokenLayout

RELEASE_BYTES = 256 << 20
"""Bytes read from memory maps after which their pages are let go."""

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

    def __init__(self, zoo: Zoo, layout: TokenLayout, cache_bytes: int = 256 << 20) -> None:
        self.zoo = zoo
        self.layout = layout
        self.cache_bytes = cache_bytes
        self._start()

    def _start(self) -> None:
        shape = (len(self.zoo), self.layout.num_tokens, self.layout.token_size)
        fits = 4 * int(np.prod(shape, dtype=np.int64)) <= self.cache_bytes
        self._cache = torch.empty(shape) if fits else None
        self._cached: set[int] = set()
        self._lock = threading.Lock()
        self._touched: set[int] = set()
        self._bytes_read = 0

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
        rows = torch.empty(len(checkpoints), tokens.shape[-1], self.layout.token_size)
        groups = self._groups(tokens) if tokens.ndim == 1 and self._cache is None else []
        for place, checkpoint_id in enumerate(checkpoints.tolist()):
            ids = tokens if tokens.ndim == 1 else tokens[place]
            if self._cache is not None:
                torch.index_select(self._encoded(checkpoint_id), 0, torch.from_numpy(ids), out=rows[place])
                continue
            self._clear_padding(rows[place], ids)
            self._read_groups(rows[place], checkpoint_id, groups if tokens.ndim == 1 else self._groups(ids))
        return rows

    def _encoded(self, checkpoint_id: int) -> Tensor:
        assert self._cache is not None
        with self._lock:
            if checkpoint_id not in self._cached:
                self.layout.encode_into(self._cache[checkpoint_id], self.zoo.checkpoint(checkpoint_id))
                self._cached.add(checkpoint_id)
        return self._cache[checkpoint_id]

    def _groups(self, token_ids: np.ndarray) -> list[Group]:
        return self.layout.runs.pieces(token_ids).groups()

    def _clear_padding(self, rows: Tensor, token_ids: np.ndarray) -> None:
        partial = np.flatnonzero(self.layout.runs.num_values(token_ids) < self.layout.token_size)
        rows[torch.from_numpy(partial)] = 0

    def _read_groups(self, rows: Tensor, checkpoint_id: int, groups: list[Group]) -> None:
        """Fill ``rows`` ``[N, D]``: each group is many stretches of one layer, all of one length and one place."""
        checkpoint = self.zoo.checkpoint(checkpoint_id)
        num_bytes = 0
        for index, target, length, row_ids, sources in groups:
            layer = self.layout.layers[index]
            statistics = self.layout.layer_statistics(index)
            stretches = _stretches(checkpoint.flat(layer.name), length)
            centres = None if isinstance(statistics.centre, float) else _stretches(statistics.centre, length)
            into = rows[:, target : target + length]
            step = max(1, BLOCK_VALUES // length)
            for first in range(0, len(row_ids), step):
                source = torch.from_numpy(sources[first : first + step])
                centre = statistics.centre if centres is None else centres[source]
                values = statistics.normalize(stretches[source], centre)
                into[torch.from_numpy(row_ids[first : first + step])] = values.to(rows.dtype)
            num_bytes += len(row_ids) * length * layer.dtype.itemsize
        self._count(checkpoint_id, num_bytes)

    def _count(self, checkpoint_id: int, num_bytes: int) -> None:
        with self._lock:
            self._touched.add(checkpoint_id)
            self._bytes_read += num_bytes
            if self._bytes_read < RELEASE_BYTES:
                return
            touched, self._touched, self._bytes_read = self._touched, set(), 0
        for layer in self.layout.layers:
            for number in touched:
                release_pages(self.zoo.checkpoint(number), layer.name)
            self.layout.statistics.release(layer.name)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.zoo.path, "layout": self.layout, "cache_bytes": self.cache_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        path: Path = state["path"]
        self.__init__(Zoo.open(path), state["layout"], state["cache_bytes"])  # type: ignore[misc]


def _stretches(flat: Tensor, length: int) -> Tensor:
    """All stretches of ``length`` values as overlapping rows of a view, ``[len(flat) - length + 1, length]``."""
    return flat.as_strided((len(flat) - length + 1, length), (1, 1))


def _require_range(what: str, ids: np.ndarray, count: int) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= count):
        raise IndexError(f"{what}_ids: found {ids.min()} to {ids.max()}, expected 0 to {count - 1}")

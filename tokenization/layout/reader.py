"""The tokens of a zoo as a training loop reads them: a small zoo from memory, of a large one single rows."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenization.files import empty_huge
from tokenization.layout.layout import TokenLayout
from tokenization.layout.rows import Ids, checked_ids, read_rows
from tokenization.zoo.zoo import Zoo

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

"""Spectral tokens from a zoo, and generated ones to disk."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from tokenization.layout.writer import CheckpointWriter
from tokenization.spectral.layout import SpectralLayout
from tokenization.zoo.zoo import Zoo


class SpectralReader:
    """Reads coefficients of a zoo's checkpoints: those that the basis was found from are in memory.

    Other checkpoints are projected when they are first asked for, and kept. Thread-safe.

    Args:
        zoo: the checkpoints.
        layout: as ``SpectralLayout.fit`` made it for this zoo.
    """

    def __init__(self, zoo: Zoo, layout: SpectralLayout) -> None:
        self.zoo, self.layout = zoo, layout
        self._known: dict[int, Tensor] = {}
        if layout.fitted is not None:
            self._known = dict(zip(layout.indices, layout.fitted.coefficients, strict=True))
        self._lock = threading.Lock()

    def read(self, checkpoint_ids: Tensor | Sequence[int], token_ids: Tensor | Sequence[int]) -> Tensor:
        """Rows ``[B, N, k]`` float32; arguments as of `TokenReader.read`. Raises IndexError for an id out of range."""
        ids = torch.as_tensor(token_ids, device="cpu")
        numbers = [int(number) for number in checkpoint_ids]
        if any(not 0 <= number < len(self.zoo) for number in numbers):
            raise IndexError(f"checkpoint_ids {numbers} must lie in 0 to {len(self.zoo) - 1}")
        whole = torch.stack([self._coefficients(number) for number in numbers])  # [B, T, k]
        if ids.dim() == 1:
            return whole[:, ids]
        return whole.gather(1, ids[..., None].expand(-1, -1, whole.shape[-1]))

    def _coefficients(self, number: int) -> Tensor:
        with self._lock:
            if number not in self._known:
                self._known[number] = self.layout.encode(self.layout.checkpoint(self.zoo, number))
            return self._known[number]


class SpectralWriter:
    """`CheckpointWriter` for coefficients: they become tokens block by block on their way to the file.

    Raises:
        InputError: the disk is full or refuses; nothing is left behind.
    """

    def __init__(self, path: Path | str, layout: SpectralLayout, metadata: Mapping[str, str] | None = None) -> None:
        self.layout = layout
        self._writer = CheckpointWriter(path, layout.cut, metadata, exact=False)

    def write(self, first_token: int, rows: Tensor) -> None:
        """Write spectral tokens ``first_token …``, ``[n, k]``. Raises ValueError if they do not fit into ``[T, k]``."""
        layout = self.layout
        if rows.shape[1:] != (layout.token_size,) or not 0 <= first_token <= layout.num_tokens - len(rows):
            raise ValueError(
                f"rows from token {first_token} on have shape {list(rows.shape)}, which does not fit the layout"
            )
        for first, wide in layout.expand(rows.detach().cpu(), first_token, first_token + len(rows)):
            self._writer.write(first, wide)

    def close(self) -> None:
        """Put the file in place. Raises ValueError when a token was never written."""
        self._writer.close()

    def abort(self) -> None:
        """Drop all that was written."""
        self._writer.abort()

    def __enter__(self) -> SpectralWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close() if error is None else self.abort()

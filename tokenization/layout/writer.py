"""Generated tokens to disk: one safetensors file, written row by row, never held in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from torch import Tensor

from tokenization.checkpoint.safetensors import ORDER_KEY
from tokenization.checkpoint.tensor_file import TensorFile
from tokenization.layout.description import LayoutDescription
from tokenization.layout.rows import values_of


class CheckpointWriter:
    """Streams tokens, denormalised, to their places in one safetensors file, and puts it in place on ``close``.

    Rows may come in any order and from several processes (send each a pickled copy). Every key of the state dict is
    in the file, tied ones as copies, so that ``load_state_dict(strict=True)`` takes it as it is.

    Args:
        path: the file.
        layout: a fitted layout.
        metadata: strings for the header; ``format: pt`` is added, which transformers asks for.
        exact: denormalise in float64, as ``decode`` does; in float32 otherwise.

    Raises:
        InputError: the disk is full or refuses; nothing is left behind.
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
                f"rows from token {first_token} on have shape {list(rows.shape)}, which must be "
                f"[up to {layout.num_tokens - first_token}, {layout.token_size}]"
            )
        for name, first, values in values_of(layout, first_token, rows, exact=self.exact):
            self._put(name, first, values)
        self._file.write_bytes(b"\1" * len(rows), self._file.size + first_token)

    def close(self) -> None:
        """Put the file in place; in another process's copy, only stop writing.

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

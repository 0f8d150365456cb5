"""Generated compressed weights to disk: tokens stream into a temporary file, which is then stored as the zoo's are."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.saving import save_checkpoint
from tokenization.compressed.form import Compressed
from tokenization.files import temporary_name


class CompressedWriter:
    """`CheckpointWriter` for compressed weights: a mask is cut once all of its logits are there.

    One network, in the form of its tokens, is in memory while the file is closed.

    Args:
        path: the file.
        form: stores the weights.
        open_writer: a writer of the tokens' own form, given a path.
        metadata: strings for the header.

    Raises:
        InputError: the disk is full or refuses; nothing is left behind.
    """

    def __init__(
        self, path: Path | str, form: Compressed, open_writer: Callable[[Path], Any], metadata: Mapping[str, str] | None
    ) -> None:
        self.path, self.form, self.metadata = Path(path), form, dict(metadata or {})
        self.process = os.getpid()
        self.expanded = temporary_name(self.path)
        self._writer = open_writer(self.expanded)

    def write(self, first_token: int, rows: Tensor) -> None:
        """Write tokens ``first_token …``. Raises ValueError if they do not fit into the layout."""
        self._writer.write(first_token, rows)

    def close(self) -> None:
        """Put the file in place; in another process's copy, only stop writing. Raises as `CheckpointWriter.close`."""
        self._writer.close()
        if self.process != os.getpid() or not self.expanded.exists():
            return
        try:
            stored = self.form.compress(Checkpoint.open(self.expanded).state_dict())
            save_checkpoint(self.path, stored, self.metadata, materialize_ties=True)
        finally:
            self.expanded.unlink(missing_ok=True)

    def abort(self) -> None:
        """Drop all that was written. Harmless when repeated."""
        self._writer.abort()

    def __enter__(self) -> CompressedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close() if error is None else self.abort()

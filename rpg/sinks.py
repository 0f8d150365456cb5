"""Where generated tokens go, tile by tile: into memory, or straight into their places on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.adapter_folder import WEIGHTS_NAME, write_side_files
from rpg.sampling import Tile
from tokenization.layout import TokenLayout
from tokenization.writer import CheckpointWriter


class MemorySink:
    """Collects tiles and decodes them into state dicts."""

    def __init__(self, layout: TokenLayout, num: int) -> None:
        self.layout = layout
        self.tokens = torch.empty(num, layout.num_tokens, layout.token_size)

    def __enter__(self) -> MemorySink:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def take(self, tile: Tile, rows: Tensor) -> None:
        """Keep the rows ``[G, n, D]`` of a tile."""
        self.tokens[tile.network : tile.network + tile.num_networks, tile.token : tile.token + tile.num_tokens] = rows

    def result(self) -> list[dict[str, Tensor]]:
        """One state dict a network."""
        return [self.layout.decode(tokens) for tokens in self.tokens]


class FolderSink:
    """Streams tiles into one safetensors file (adapters: one PEFT folder) a network, which appears when it is whole.

    Args:
        layout: how tokens become checkpoints.
        folder: where the files go.
        metadata: gives the file metadata of network ``index``.
        adapter: text of ``adapter_config.json`` where the networks are adapters.
    """

    def __init__(
        self, layout: TokenLayout, folder: Path, metadata: Callable[[int], dict[str, str]], adapter: str | None = None
    ) -> None:
        self.layout, self.folder, self.metadata, self.adapter = layout, folder, metadata, adapter
        self.paths: list[Path] = []
        self.open: dict[int, CheckpointWriter] = {}

    def __enter__(self) -> FolderSink:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        for index, writer in self.open.items():
            writer.__exit__(kind, error, trace)
            if self.adapter is not None:
                with contextlib.suppress(OSError):  # an earlier adapter stays
                    self._path(index).rmdir()

    def take(self, tile: Tile, rows: Tensor) -> None:
        """Write the rows ``[G, n, D]`` of a tile to their places."""
        for offset in range(tile.num_networks):
            index = tile.network + offset
            if index not in self.open:
                self.open[index] = self._writer(index)
                self.paths.append(self._path(index))
            self.open[index].write(tile.token, rows[offset])
            if tile.token + tile.num_tokens == self.layout.num_tokens:
                if self.adapter is not None:
                    write_side_files(self._path(index), self.adapter, self.metadata(index))
                self.open.pop(index).close()

    def _path(self, index: int) -> Path:
        return self.folder / (f"network-{index:05d}" + (".safetensors" if self.adapter is None else ""))

    def _writer(self, index: int) -> CheckpointWriter:
        path = self._path(index)
        if self.adapter is not None:
            with contextlib.suppress(FileExistsError):  # a file in the way is the writer's error
                path.mkdir()
            path = path / WEIGHTS_NAME
        return CheckpointWriter(path, self.layout, self.metadata(index))

    def result(self) -> list[Path]:
        """The files or folders, in the order of the networks."""
        return self.paths

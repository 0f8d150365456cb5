"""Where generated tokens go, tile by tile: into memory, or straight into their places on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    """Streams tiles into one safetensors file a network; a file appears when it is whole.

    ``metadata`` gives the file metadata of network ``index``.
    """

    def __init__(self, layout: TokenLayout, folder: Path, metadata: Callable[[int], dict[str, str]]) -> None:
        self.layout, self.folder, self.metadata = layout, folder, metadata
        self.paths: list[Path] = []
        self.open: dict[int, CheckpointWriter] = {}

    def __enter__(self) -> FolderSink:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        for writer in self.open.values():
            writer.__exit__(kind, error, trace)

    def take(self, tile: Tile, rows: Tensor) -> None:
        """Write the rows ``[G, n, D]`` of a tile to their places."""
        for offset in range(tile.num_networks):
            index = tile.network + offset
            if index not in self.open:
                path = self.folder / f"network-{index:05d}.safetensors"
                self.open[index] = CheckpointWriter(path, self.layout, self.metadata(index))
                self.paths.append(path)
            self.open[index].write(tile.token, rows[offset])
            if tile.token + tile.num_tokens == self.layout.num_tokens:
                self.open.pop(index).close()

    def result(self) -> list[Path]:
        """The files, in the order of the networks."""
        return self.paths

"""Where generated tokens go, tile by tile: into memory, or straight into their places on disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.devices import Partition
from rpg.generation.folders import WEIGHTS_NAME, write_side_files
from rpg.generation.request import PROVENANCE
from rpg.generation.sampler import Tile
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError
from tokenization.files import atomic_folder
from tokenization.layouts import Layout, Writer, checkpoint_writer
from tokenization.zoo.locks import locked


class MemorySink:
    """Collects tiles and decodes them into state dicts."""

    def __init__(self, layout: Layout, num: int) -> None:
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


def decoded_networks(layout: Layout, tiles: Iterable[tuple[Tile, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """One network after another from the tiles of them all, in their order; no more than a tile's are held at once."""
    sink = MemorySink(layout, 0)
    for tile, rows in tiles:
        if tile.token == 0:
            sink = MemorySink(layout, tile.num_networks)
        sink.take(replace(tile, network=0), rows.cpu())
        if tile.token + tile.num_tokens == layout.num_tokens:
            networks, sink = sink.result(), MemorySink(layout, 0)
            while networks:
                yield networks.pop(0)  # kept by whoever asked for it alone


class FolderSink:
    """Streams tiles into one safetensors file (adapters: one PEFT folder) a network, which appears when it is whole.

    Args:
        folder: where the files go; several processes must see the same one.
        metadata: gives the file metadata of network ``index``.
        adapter: text of ``adapter_config.json`` where the networks are adapters.
        shared: the networks whose tiles come from all processes; the first process makes and publishes their files.
        overwrite: whether networks of another generator or request may be replaced.
    """

    def __init__(
        self, layout: Layout, folder: Path, metadata: Callable[[int], dict[str, str]], num: int, adapter: str | None,
        partition: Partition, shared: range, overwrite: bool,
    ) -> None:  # fmt: skip
        self.layout, self.folder, self.metadata, self.num, self.adapter = layout, folder, metadata, num, adapter
        self.partition, self.shared, self.overwrite = partition, shared, overwrite
        self.open: dict[int, Writer] = {}
        self.adapters: dict[int, AbstractContextManager[Path]] = {}  # folders that are being filled
        self.lock = contextlib.ExitStack()

    def __enter__(self) -> FolderSink:
        _make_folder(self.folder)
        together = self.partition.size > 1
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.folder, together=together))
            if not self.overwrite and self.partition.rank == 0:
                self._keep_others()
            if together:
                from accelerate.utils import broadcast_object_list

                first = self.partition.rank == 0
                self.open = broadcast_object_list([{i: self._writer(i) for i in self.shared} if first else None])[0]
            self.lock = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        with self.lock:
            if kind is not None:
                for writer in self.open.values():
                    writer.__exit__(kind, error, trace)
                for folder in self.adapters.values():  # an earlier adapter stays
                    with contextlib.suppress(InputError):
                        folder.__exit__(kind, error, trace)
            elif self.partition.size > 1:
                torch.distributed.barrier()  # every tile is written before a shared file is published
                for index in self.shared:
                    self._publish(index)
                torch.distributed.barrier()  # every file is there before any process says so

    def take(self, tile: Tile, rows: Tensor) -> None:
        """Write the rows ``[G, n, D]`` of a tile to their places."""
        for offset in range(tile.num_networks):
            index = tile.network + offset
            if index not in self.open:
                self.open[index] = self._writer(index)
            self.open[index].write(tile.token, rows[offset])
            if index not in self.shared and tile.token + tile.num_tokens == self.layout.num_tokens:
                self._publish(index)

    def result(self) -> list[Path]:
        """The files or folders of all networks, in their order."""
        return [self._path(index) for index in range(self.num)]

    def _publish(self, index: int) -> None:
        self.open.pop(index).close()
        if index in self.adapters:
            self.adapters.pop(index).__exit__(None, None, None)

    def _path(self, index: int) -> Path:
        return self.folder / (f"network-{index:05d}" + (".safetensors" if self.adapter is None else ""))

    def _keep_others(self) -> None:
        """Raise InputError where a network is there that this request would not make again."""
        for index in range(self.num):
            path = self._path(index)
            file = path / WEIGHTS_NAME if self.adapter is not None else path
            if file.is_file() and Checkpoint.open(file).metadata.get(PROVENANCE) != self.metadata(index)[PROVENANCE]:
                raise InputError(
                    f"{path} is another generator's or of another request; name another folder with --output, or "
                    "replace what is there with --overwrite"
                )

    def _writer(self, index: int) -> Writer:
        path = self._path(index)
        if self.adapter is not None:
            self.adapters[index] = atomic_folder(path)
            folder = self.adapters[index].__enter__()
            write_side_files(folder, self.adapter, self.metadata(index))
            path = folder / WEIGHTS_NAME
        return checkpoint_writer(path, self.layout, self.metadata(index))


def _make_folder(folder: Path) -> None:
    """Make a folder to write into. Raises InputError, before anything is computed, if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found = "a file is there" if folder.is_file() else (error.strerror or str(error)).lower()
        raise InputError(f"The folder {folder} cannot be made ({found}); choose another with --output.") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"The folder {folder} may not be written to; choose another with --output.")

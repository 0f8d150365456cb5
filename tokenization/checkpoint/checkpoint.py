"""One checkpoint on disk: opened lazily by memory map, checked before use, saved atomically.

A checkpoint is a safetensors file, a sharded one with its index, or a folder that holds either (a PEFT adapter, a
timm or transformers ``save_pretrained`` folder). Pickles are for `read_state_dict` alone, to be converted once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenization.checkpoint.pickles import cut_prefixes, load_pickle, pickled_files
from tokenization.checkpoint.safetensors import (
    ORDER_KEY,
    TIES_KEY,
    TensorInfo,
    locate,
    order_of,
    read_header,
    tensor_at,
    ties_of,
)
from tokenization.checkpoint.saving import find_ties, header_of, save_checkpoint
from tokenization.errors import InputError

__all__ = [
    "ORDER_KEY",
    "TIES_KEY",
    "Checkpoint",
    "TensorInfo",
    "find_ties",
    "header_of",
    "read_state_dict",
    "save_checkpoint",
]


class Checkpoint:
    """A checkpoint whose values stay on disk until they are asked for.

    Safe to use across ``fork`` and to pickle: a copy in another process maps the files again when it first reads.

    Attributes:
        path: what was opened: a file or a folder.
        tensors: the stored tensors in the order of the state dict.
        ties: ``{alias: stored name}``; an alias is a key of the state dict but not of ``tensors``.
        order: every key of the state dict, aliases included.
        ordered: whether the file records that order; without it names are sorted, ``block.2`` before ``block.10``.
        metadata: the strings in the header, ``rpg.order`` and ``rpg.ties`` left out.
        sizes: the files the values lie in, and their sizes in bytes.
    """

    def __init__(
        self,
        path: Path,
        tensors: dict[str, TensorInfo],
        ties: dict[str, str],
        order: list[str],
        ordered: bool,
        metadata: dict[str, str],
        sizes: dict[Path, int],
    ) -> None:
        self.path = path
        self.tensors = tensors
        self.ties = ties
        self.order = order
        self.ordered = ordered
        self.metadata = metadata
        self.sizes = sizes
        self._maps: dict[Path, Tensor] = {}

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Read and check the header(s); no values are read.

        Raises:
            InputError: there is no checkpoint, or it is truncated, inconsistent, or of an unknown dtype.
        """
        path = Path(path)
        if pickled := pickled_files(path):
            path = pickled[0]
        header = read_header(locate(path))
        if not header.tensors:
            raise InputError(str(path), "no tensor", "a checkpoint", "check the file")
        ties = ties_of(header, path)
        order, ordered = order_of(header, ties, path)
        tensors = {name: header.tensors[name] for name in order if name in header.tensors}
        metadata = {key: text for key, text in header.metadata.items() if key not in (ORDER_KEY, TIES_KEY)}
        return cls(path, tensors, ties, order, ordered, metadata, header.sizes)

    def flat(self, name: str) -> Tensor:
        """All values of a tensor, ``[num_values]`` of the stored dtype, in the memory map: no copy is made.

        Writing into it changes this process's view, never the file.
        """
        info = self.info(name)
        data = self._map(info.file)[info.offset : info.offset + info.num_bytes]
        if info.offset % info.dtype.itemsize:  # only foreign writers leave tensors unaligned
            data = data.clone()
        return data.view(info.dtype)

    def tensor(self, name: str) -> Tensor:
        """A copy of a tensor in its shape."""
        return self.flat(name).clone().reshape(self.info(name).shape)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all tensors under every key; an alias is the very tensor object it is tied to."""
        stored = {name: self.tensor(name) for name in self.tensors}
        return {name: stored[self.ties.get(name, name)] for name in self.order}

    def info(self, name: str) -> TensorInfo:
        """Where a tensor (or the one an alias is tied to) lies. Raises InputError when there is none of the name."""
        info = self.tensors.get(self.ties.get(name, name))
        if info is None:
            raise InputError(tensor_at(self.path, name), "no such tensor", "one of the checkpoint's own names")
        return info

    def _map(self, file: Path) -> Tensor:
        if file not in self._maps:
            size = self.sizes[file]
            try:
                found = file.stat().st_size
                if found != size:
                    raise InputError(str(file), f"{found} bytes", f"{size} as when it was opened", "open it again")
                # A private map: no file descriptor is kept, so that a zoo may hold thousands of files open.
                storage = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=size)
            except (OSError, RuntimeError) as error:
                raise InputError(str(file), f"an unreadable file ({error})", "the file as it was opened") from error
            self._maps[file] = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
        return self._maps[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self.tensors)} tensors)"


def read_state_dict(path: Path | str) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of any kind, pickles (.pth, .pt, .bin) included, in the order of its state dict.

    Nesting (``{"state_dict": …}``; averaged weights are preferred where there are both) is unwrapped, and the
    ``module.`` and ``_orig_mod.`` of wrappers are cut off the names.

    Raises:
        InputError: there is no checkpoint or a broken one; a pickle that holds code is refused, not run.
    """
    path = Path(path)
    pickled = pickled_files(path)
    if not pickled:
        return cut_prefixes(Checkpoint.open(path).state_dict())
    state_dict: dict[str, Tensor] = {}
    for file in pickled:
        state_dict |= load_pickle(file)
    return cut_prefixes(state_dict)

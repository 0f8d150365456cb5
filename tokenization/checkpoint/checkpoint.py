"""One checkpoint on disk: opened lazily by memory map, checked before use, saved atomically.

It is a safetensors file, a sharded one with its index, or a folder that holds either (a PEFT adapter, a timm or
transformers ``save_pretrained`` folder). Pickles are for `read_state_dict` alone, to be converted once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenization.checkpoint.pickles import kind_of, load_inert
from tokenization.checkpoint.safetensors import (
    ORDER_KEY,
    TIES_KEY,
    TensorInfo,
    TensorSpec,
    locate,
    order_of,
    read_header,
    read_json,
    shards_of,
    tensor_at,
    ties_of,
)
from tokenization.checkpoint.tensor_file import find_ties
from tokenization.checkpoint.tensor_file import save_checkpoint as save_checkpoint
from tokenization.checkpoint.weights import AS_FOUND, Chosen, Weights, plain_names, weights_in
from tokenization.errors import InputError
from tokenization.files import drop_pages

_FOLDER_FILES = ("adapter_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(eq=False, repr=False)
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
        sizes: bytes of each file the values lie in.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    ties: dict[str, str]
    order: list[str]
    ordered: bool
    metadata: dict[str, str]
    sizes: dict[Path, int]
    _maps: dict[Path, Tensor] = field(default_factory=dict, init=False)

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Read and check the header(s); no values are read.

        Raises InputError if there is no checkpoint, or it is truncated, inconsistent, or of an unknown dtype.
        """
        path = Path(path)
        if pickled := pickled_files(path):
            what = f"{pickled[0]} is a pickle, which cannot be read in parts"
            raise InputError(f"{what}; convert it once with `rpg collect --from`")
        header = read_header(locate(path))
        if not header.tensors:
            raise InputError(f"{path} has no tensor; name a checkpoint")
        ties = ties_of(header, path)
        order, ordered = order_of(header, ties, path)
        tensors = {name: header.tensors[name] for name in order if name in header.tensors}
        metadata = {key: text for key, text in header.metadata.items() if key not in (ORDER_KEY, TIES_KEY)}
        return cls(path, tensors, ties, order, ordered, metadata, header.sizes)

    @classmethod
    def without_values(cls, state_dict: Mapping[str, Tensor], path: Path) -> Checkpoint:
        """Names, dtypes, shapes and ties of a state dict (on the meta device, too): its values cannot be read."""
        ties = find_ties(state_dict)
        tensors = {
            name: TensorInfo(name, tensor.dtype, tuple(tensor.shape), path, 0)
            for name, tensor in state_dict.items()
            if name not in ties
        }
        return cls(path, tensors, ties, list(state_dict), True, {}, {})

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of each stored tensor."""
        return {name: info.spec for name, info in self.tensors.items()}

    def arranged(self, ties: Mapping[str, str], not_finite: Collection[str] = ()) -> Checkpoint:
        """The same with the ties ``{alias: stored name}`` alone: copies are dropped, what was left out is put in.

        ``not_finite`` are tensors known to hold NaN or infinite values.
        """
        order = [*self.order, *(alias for alias in ties if alias not in self.order)]
        order += [name for name in dict.fromkeys(ties.values()) if name not in order]
        owner = {name: alias for alias, name in ties.items() if name not in self.order and alias in self.order}
        tensors = {
            name: replace(self.info(owner.get(name, name)), name=name, finite=name not in not_finite)
            for name in order
            if name not in ties
        }
        return replace(self, tensors=tensors, ties=dict(ties), order=order)

    def flat(self, name: str) -> Tensor:
        """All values of a tensor, ``[num_values]`` of the stored dtype, in the private memory map: no copy is made."""
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

    def load(self) -> dict[str, Tensor]:
        """`state_dict`, and no page of the file in this process any longer."""
        state_dict = self.state_dict()
        for name in self.tensors:
            self.release(name)
        return state_dict

    def release(self, name: str, first: int = 0, last: int | None = None) -> None:
        """Drop the pages of values ``[first, last)`` from this process, where it can; reading maps them again."""
        info = self.tensors[name]
        if info.offset % info.dtype.itemsize:  # an unaligned tensor is a copy, not the map
            return
        part = self.flat(name)[first:last]
        mapped = self._map(info.file)
        drop_pages(mapped.data_ptr(), self.sizes[info.file], part.data_ptr(), part.nbytes)

    def require(self, specs: Mapping[str, TensorSpec]) -> None:
        """Check that there are tensors of these dtypes and shapes. Raises InputError that names the first at fault."""
        for name, (dtype, shape) in specs.items():
            info = self.tensors.get(name)
            found = "missing" if info is None else f"{info.dtype} of shape {list(info.shape)}"
            if info is None or info.spec != (dtype, shape):
                what = f"{tensor_at(self.path, name)} is {found}, but should be {dtype} of shape {list(shape)}"
                raise InputError(f"{what}; copy the file again")

    def info(self, name: str) -> TensorInfo:
        """Where a tensor (or the one an alias is tied to) lies. Raises InputError when there is none of the name."""
        info = self.tensors.get(self.ties.get(name, name))
        if info is None:
            raise InputError(f"{tensor_at(self.path, name)} does not exist; use one of the checkpoint's own names")
        return info

    def _map(self, file: Path) -> Tensor:
        if file not in self._maps:
            size = self.sizes[file]
            try:
                found = file.stat().st_size
                if found != size:
                    raise InputError(f"{file} has {found} bytes, but had {size} when it was opened; open it again")
                # A private map: no file descriptor is kept, so that a zoo may hold thousands of files open.
                storage = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=size)
            except (OSError, RuntimeError) as error:
                raise InputError(f"{file} is no longer readable ({error}); put it back") from error
            self._maps[file] = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
        return self._maps[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self.tensors)} tensors)"


def read_state_dict(path: Path | str, chosen: Chosen = AS_FOUND) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of any kind, pickles included, in the order of its state dict: `read_weights`."""
    return read_weights(path, chosen).tensors


def read_weights(path: Path | str, chosen: Chosen = AS_FOUND) -> Weights:
    """The weights in a checkpoint of any kind, named as in the plain network, and what was passed over.

    Args:
        path: safetensors, a pickle, shards of either, or a folder that holds one.

    Raises:
        NoWeightsError: it is read and holds no weights.
        InputError: there is no checkpoint, a broken one, one of another program, several sets of weights and none
            chosen, or a pickle that holds code, which is not run.
    """
    path = Path(path)
    if pickled := pickled_files(path):
        parts = [weights_in(load_inert(file), file, chosen.key) for file in pickled]
        tensors = {name: value for part in parts for name, value in part.tensors.items()}
        notes = [note for part in parts for note in part.notes]
    else:
        tensors, notes = Checkpoint.open(path).state_dict(), []
    renamed = plain_names(list(tensors), path, chosen, {name: tuple(value.shape) for name, value in tensors.items()})
    named = {text: tensors[name] for name, text in renamed.names.items()}
    return Weights(named, list(dict.fromkeys([*notes, *renamed.notes])))


def has_plain_names(checkpoint: Checkpoint, chosen: Chosen) -> bool:
    """Whether a safetensors checkpoint can stay as it is. Raises InputError as `plain_names` does."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return plain_names(checkpoint.order, checkpoint.path, chosen, shapes).same


def pickled_files(path: Path) -> list[Path]:
    """The pickles that ``path``, one or a folder of them, stands for. Raises InputError for foreign formats."""
    if path.is_file():
        if path.name.endswith(".bin.index.json"):
            return shards_of(read_json(path), path)
        return [path] if kind_of(path) in ("torch", "pickle") else []
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return []
    for name in _FOLDER_FILES:
        file = path / name
        if file.is_file():
            return shards_of(read_json(file), file) if file.suffix == ".json" else [file]
    return []

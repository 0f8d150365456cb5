"""What is computed once of a zoo and kept in its folder ``cache``, which may be deleted at any time.

So are the other forms of checkpoints, in which they become tokens.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint, StateDict
from tokenization.checkpoint.safetensors import TensorSpec
from tokenization.checkpoint.tensor_file import TensorFile
from tokenization.errors import InputError
from tokenization.files import remove_abandoned
from tokenization.zoo.zoo import Zoo

CACHE_FOLDER = "cache"


def cache_path(zoo: Zoo, kind: str, key: Any) -> Path:
    """The file of a zoo's cache that holds what follows from ``key`` (JSON values) alone."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return zoo.path / CACHE_FOLDER / f"{kind}-{digest[:24]}.safetensors"


def cached_tensors(
    zoo: Zoo, kind: str, key: Any, specs: Mapping[str, TensorSpec], write: Callable[[TensorFile], None]
) -> Checkpoint:
    """Tensors from a zoo's cache, computed if they are not there; for this process alone if it may not be written.

    Args:
        kind: what they are, the first part of the file's name.
        key: JSON values: all that decides them.
        write: computes tensors of these ``specs`` and writes them into the file.

    Raises InputError where ``write`` does, or no disk has room.
    """
    path = cache_path(zoo, kind, key)
    folders = [path.parent, Path(_scratch().name)] if _scratch.cache_info().currsize else [path.parent]
    for folder in folders:
        with contextlib.suppress(InputError):  # whatever is wrong with a cache, it is made again
            checkpoint = Checkpoint.open(folder / path.name)
            checkpoint.require(specs)
            return checkpoint
    with _new_file(path, specs) as file:
        write(file)
    return Checkpoint.open(file.path)


def _new_file(path: Path, specs: Mapping[str, TensorSpec]) -> TensorFile:
    try:
        path.parent.mkdir(exist_ok=True)
        remove_abandoned(path.parent)
        return TensorFile(path, specs)
    except (OSError, InputError):  # a zoo that may not be written, or a full disk
        return TensorFile(Path(_scratch().name) / path.name, specs, reserve=False)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="rpg-")  # goes with the process


MARK = "rpg.canonical"
"""Metadata of an opened checkpoint in another form: the key of the form."""


class Form(ABC):
    """Opens checkpoints in their other form, and keeps them for the next call."""

    def __init__(self) -> None:
        self._opened: tuple[Zoo | None, dict[int, Checkpoint]] = (None, {})
        self._lock = threading.Lock()

    def checkpoint(self, zoo: Zoo, index: int) -> Checkpoint:
        """An entry of a zoo in this form: what differs from the zoo's cache, made if need be, the rest as it is.

        Raises InputError if the checkpoint is broken, or there is no place to write.
        """
        with self._lock:
            if self._opened[0] is not zoo:
                self._opened = (zoo, {})
            opened = self._opened[1]
            if index not in opened:
                opened[index] = self._open(zoo, index)
            return opened[index]

    def apply(self, source: Checkpoint | StateDict) -> Checkpoint | StateDict:
        """A checkpoint in this form, in memory; one that ``checkpoint`` gave is returned as it is."""
        if not isinstance(source, Checkpoint):
            return self.expand(source)
        return source if source.metadata.get(MARK) == self.key else self.expand(source.state_dict())

    @property
    @abstractmethod
    def key(self) -> str:
        """SHA-256 (hexadecimal) of all that decides the form."""

    @abstractmethod
    def expand(self, network: StateDict) -> dict[str, Tensor]:
        """A state dict, as it is stored, in this form."""

    @abstractmethod
    def _open(self, zoo: Zoo, index: int) -> Checkpoint:
        """An entry in this form, with `MARK` among its metadata."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_opened", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Form.__init__(self)
        self.__dict__.update(state)

"""What is computed once of a zoo and kept in its folder ``cache``, which may be deleted at any time."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.tensor_file import TensorFile, TensorSpec
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
        zoo: whose cache.
        kind: what they are, the first part of the file's name.
        key: JSON values: all that decides them.
        specs: their dtypes and shapes.
        write: computes them and writes them into the file.

    Raises:
        InputError: what ``write`` raises, or no disk has room.
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

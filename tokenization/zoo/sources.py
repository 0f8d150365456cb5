"""Which checkpoints a folder or a glob stands for."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from tokenization.checkpoint.pickles import SUFFIXES
from tokenization.checkpoint.safetensors import natural_key, read_json
from tokenization.errors import InputError
from tokenization.lora.adapter import is_adapter

CONVERTED_NAME = re.compile(r"[0-9]{6}\.safetensors")
"""How `Zoo.append` names files in ``checkpoints/``."""

_INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
_FOLDER_FILES = {
    stem + suffix
    for stem in ("model", "diffusion_pytorch_model", "pytorch_model")
    for suffix in (".safetensors", ".bin", *_INDEX_SUFFIXES)
}
"""A folder that holds one of these is one checkpoint."""


def find_checkpoints(source: Path | str, zoo_path: Path | None = None) -> list[Path]:
    """The checkpoints (files, or folders that hold one) that a folder or glob stands for, ``step2`` before ``step10``.

    Args:
        source: an existing path, or a glob.
        zoo_path: a zoo whose own files are no sources: those it converted, and all if it lies in the source.

    Raises:
        InputError: there are none.
    """
    text = str(source)
    matches = [Path(text)] if os.path.exists(text) else [Path(match) for match in glob.glob(text, recursive=True)]
    if not matches:
        raise InputError(f"{text} does not exist; give a folder or glob of checkpoints")
    found: dict[Path, None] = {}
    for path in sorted(matches, key=lambda path: natural_key(path.as_posix())):
        if path.is_dir():
            found |= dict.fromkeys(_search(path, zoo_path))
        elif path.name.startswith("adapter_model.") and is_adapter(path.parent):
            found[path.parent] = None
        else:
            found[path] = None
    # A glob such as ** matches a folder and its files alike.
    found = {path: None for path in found if path.is_dir() or path.parent not in found}
    if zoo_path is not None:
        own = (zoo_path / "checkpoints").resolve()
        found = {
            path: None for path in found if path.resolve().parent != own or not CONVERTED_NAME.fullmatch(path.name)
        }
    if not found:
        raise InputError(f"{text} has no checkpoint; they end in .safetensors, {', '.join(SUFFIXES)}")
    return list(found)


def folder_of(source: Path | str) -> Path:
    """The folder that a source is, or lies in; of a glob the part before its first pattern."""
    path = Path(source)
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def _search(folder: Path, zoo_path: Path | None, seen: set[Path] | None = None) -> list[Path]:
    seen = set() if seen is None else seen
    seen.add(folder.resolve())  # links may lead in circles
    try:
        children = sorted(folder.iterdir(), key=lambda path: natural_key(path.name))
    except OSError as error:
        raise InputError(f"{folder} is unreadable ({error.strerror}); make it readable or name another") from error
    names = {child.name for child in children}
    if is_adapter(folder) or not names.isdisjoint(_FOLDER_FILES):
        found = [folder]
    else:
        indices = [child for child in children if child.name.endswith(_INDEX_SUFFIXES)]
        shards: set[str] = set()
        for index in indices:
            content = read_json(index)
            weight_map = content.get("weight_map") if isinstance(content, dict) else None
            shards |= set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        files = [child for child in children if child.suffix in (".safetensors", *SUFFIXES) and not child.is_dir()]
        found = [*indices, *(file for file in files if file.name not in shards)]
        found.sort(key=lambda path: natural_key(path.name))
    for child in children:
        if not child.is_dir() or child.name.startswith(".") or child.resolve() in seen:
            continue
        if zoo_path is None or child.resolve() != zoo_path.resolve():
            found += _search(child, zoo_path, seen)
    return found

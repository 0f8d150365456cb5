"""Which checkpoints a folder or a glob stands for."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from tokenization.checkpoint.formats import INDEX_SUFFIXES, SUFFIXES, kind_of
from tokenization.checkpoint.safetensors import natural_key, read_json
from tokenization.errors import InputError
from tokenization.lora.adapter import is_adapter

CONVERTED_NAME = re.compile(r"[0-9]{6}\.safetensors")
"""How `Zoo.append` names files in ``checkpoints/``."""

_FOLDER_FILES = {
    stem + suffix
    for stem in ("model", "diffusion_pytorch_model", "pytorch_model")
    for suffix in (".safetensors", ".bin", *INDEX_SUFFIXES)
}
"""A folder that holds one of these is one checkpoint."""

_SURE = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".th", ".pyth")
"""Endings of files that are checkpoints or broken ones; of others the content decides."""


def find_checkpoints(source: Path | str, zoo_path: Path | None = None, ignored: list[str] | None = None) -> list[Path]:
    """The checkpoints (files, or folders that hold one) that a folder or glob stands for, ``step2`` before ``step10``.

    Args:
        source: an existing path, or a glob.
        zoo_path: a zoo whose own files are no sources: those it converted, and all if it lies in the source.
        ignored: takes a line on each file of a folder that is left out and may have been meant.

    Raises:
        InputError: there are none.
    """
    text = str(source)
    matches = [Path(text)] if os.path.exists(text) else [Path(match) for match in glob.glob(text, recursive=True)]
    if not matches:
        raise InputError(f"{text} does not exist; give a folder or glob of checkpoints")
    found: dict[Path, None] = {}
    left_out: list[str] = []
    for path in sorted(matches, key=lambda path: natural_key(path.as_posix())):
        if path.is_dir():
            found |= dict.fromkeys(_search(path, zoo_path, left_out))
        elif path.name.startswith("adapter_model.") and is_adapter(path.parent):
            found[path.parent] = None
        else:
            found[path] = None
    # A glob such as ** matches a folder and what is in it alike.
    inside = {path: folder for path in found if not path.is_dir() for folder in path.parents if folder in found}
    left_out += dict.fromkeys(_within(path.parent) for path, folder in inside.items() if path.parent != folder)
    found = {path: None for path in found if path not in inside}
    if zoo_path is not None:
        own = (zoo_path / "checkpoints").resolve()
        found = {
            path: None for path in found if path.resolve().parent != own or not CONVERTED_NAME.fullmatch(path.name)
        }
    if not found:
        what = f"has no checkpoint that is read: {left_out[0]}" if left_out else "has no checkpoint in it"
        raise InputError(f"{text} {what}" + ("" if left_out else "; name the files, or another folder"))
    if ignored is not None:
        ignored += dict.fromkeys(left_out)
    return list(found)


def folder_of(source: Path | str) -> Path:
    """The folder that a source is, or lies in; of a glob the part before its first pattern."""
    path = Path(source)
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def _search(
    folder: Path, zoo_path: Path | None, left_out: list[str], seen: set[Path] | None = None, whole: bool = False
) -> list[Path]:
    """The checkpoints in a folder; ``whole``: it lies in one, so that loose files belong to that."""
    seen = set() if seen is None else seen
    seen.add(folder.resolve())  # links may lead in circles
    try:
        children = sorted(folder.iterdir(), key=lambda path: natural_key(path.name))
    except OSError as error:
        raise InputError(f"{folder} is unreadable ({error.strerror}); make it readable or name another") from error
    names = {child.name for child in children}
    if is_adapter(folder) or not names.isdisjoint(_FOLDER_FILES):
        found, whole = [folder], True
    else:
        indices = [child for child in children if child.name.endswith(INDEX_SUFFIXES)]
        shards: set[str] = set()
        for index in indices:
            content = read_json(index)
            weight_map = content.get("weight_map") if isinstance(content, dict) else None
            shards |= set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        files = [child for child in children if child.name not in shards and _is_checkpoint(child, left_out)]
        found = sorted([*indices, *files], key=lambda path: natural_key(path.name))
        if whole and found:
            left_out.append(_within(folder))
            found = []
    for child in children:
        if not child.is_dir() or child.name.startswith(".") or child.resolve() in seen:
            continue
        if zoo_path is None or child.resolve() != zoo_path.resolve():
            found += _search(child, zoo_path, left_out, seen, whole)
    return found


def _within(folder: Path) -> str:
    return f"{folder} lies in a folder that is a checkpoint; name it to take its files"


def _is_checkpoint(file: Path, left_out: list[str]) -> bool:
    """Whether a file that was not named by itself is to be read; one of another program is left out."""
    if file.is_dir() or file.name.startswith(".") or file.name.endswith(INDEX_SUFFIXES):
        return False
    if file.suffix in _SURE:
        return True
    try:
        kind = kind_of(file) if file.is_file() else "unknown"
    except InputError as error:
        left_out.append(str(error))
        return False
    return kind in ("safetensors", "torch") or (kind == "pickle" and file.suffix in SUFFIXES)

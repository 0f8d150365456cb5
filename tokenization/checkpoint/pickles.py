"""State dicts out of pickles (.pth, .pt, .bin), without ever running what a pickle holds."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenization.checkpoint.safetensors import read_json, tensor_at
from tokenization.errors import InputError

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
"""Endings of files that are read as pickles."""

_FOLDER_FILES = ("adapter_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json")

# Where training scripts put the weights; averaged weights first, as timm prefers them.
_NESTED = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "module", "net")

# What DataParallel and torch.compile put before every name.
_PREFIXES = ("module.", "_orig_mod.")


def pickled_files(path: Path) -> list[Path]:
    """The pickles that ``path`` (a pickle or a folder with no safetensors but pickles) stands for; else none."""
    if path.is_file() and path.suffix in SUFFIXES:
        return [path]
    if path.is_file() and path.name.endswith(".bin.index.json"):
        return _shards(path)
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return []
    for name in _FOLDER_FILES:
        file = path / name
        if file.is_file() and file.suffix == ".json":
            return _shards(file)
        if file.is_file():
            return [file]
    return []


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The state dict in a pickle: nesting unwrapped, tensors on the CPU, memory-mapped where the file allows it.

    Raises:
        InputError: the file holds code (it is refused, not run), is truncated, holds no state dict, or holds
            tensors that are sparse, quantised or without data.
    """
    try:
        # Namespace is what argparse leaves in many published checkpoints; it runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # foreign bytes may fail in any way
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            what = f"{path} is a pickle that holds code ({refused[1]})"
            raise InputError(f"{what}, which is not run; save the network's state_dict() alone") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is unreadable as a pickle of tensors ({reason}); save it again") from error
    return check_tensors(_unwrap(content, path), path)


def cut_prefixes(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the ``module.`` and ``_orig_mod.`` that wrappers put before every one of them."""
    while state_dict:
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in state_dict)), None)
        if prefix is None or any(name == prefix for name in state_dict):
            break
        state_dict = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    return state_dict


def check_tensors(state_dict: Mapping[str, Any], path: Path | str) -> dict[str, Tensor]:
    """The entries of a state dict as plain dense tensors. Raises InputError that names the first which is none."""
    if not state_dict:
        raise InputError(f"{path} has no tensor; give a state dict")
    tensors: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            what = f"is of type {type(value).__name__}"
            raise InputError(f"{path}: entry {name!r} {what}, but a state dict holds tensors by name; leave it out")
        kind = None
        if value.is_quantized:
            kind = "a quantised tensor"
        elif value.layout != torch.strided or value.is_nested:
            kind = f"a sparse tensor ({value.layout})"
        elif value.is_meta:
            kind = "a tensor without data (meta device)"
        if kind:
            raise InputError(f"{tensor_at(path, name)} is {kind}; convert it to a dense tensor before saving")
        tensors[name] = value.detach()
    return tensors


def _unwrap(content: Any, path: Path) -> Mapping[str, Any]:
    while isinstance(content, Mapping):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return content
        inner = next((content[key] for key in _NESTED if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            return content  # the entry at fault is named by the caller
        content = inner
    raise InputError(f"{path} holds a {type(content).__name__}, no state dict; save the network's state_dict()")


def _shards(index: Path) -> list[Path]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise InputError(f"{index} names the shard {name}, which is not in its folder; copy it there")
    return [index.parent / name for name in names]

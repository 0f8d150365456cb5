"""Where the tensors of a checkpoint lie on disk, read from checked safetensors headers."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tokenization.errors import InputError

ORDER_KEY = "rpg.order"
"""Metadata key: JSON list of all keys of the state dict in their order (a header loses it)."""

TIES_KEY = "rpg.ties"
"""Metadata key: JSON object ``{alias: stored name}`` of the tensors that are stored once under another name."""

DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name)
    for code, name in {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
        "C64": "complex64",
    }.items()
    if hasattr(torch, name)
}

# Folders written by timm, transformers, diffusers and PEFT, in the order in which they are looked for.
_FOLDER_FILES = ("adapter_model", "model", "diffusion_pytorch_model")
_REWRITE = "copy it again or save it anew"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``num_values`` values of ``dtype`` from byte ``offset`` of ``file`` on."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def num_values(self) -> int:
        """How many values it has: 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """How many bytes of the file they take."""
        return self.num_values * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """What the header of one file (or of all shards) says: tensors, string metadata, size of each file in bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    sizes: dict[Path, int]


def natural_key(text: str) -> tuple[list[Any], str]:
    """Sort key under which ``block.2`` comes before ``block.10``."""
    parts: list[Any] = re.split(r"([0-9]+)", text)
    for index in range(1, len(parts), 2):
        digits = parts[index].lstrip("0")
        parts[index] = (len(digits), digits)
    return parts, text


def locate(path: Path) -> Path:
    """The safetensors file or index JSON that ``path`` (such a file, or a folder holding one) stands for."""
    if not path.exists():
        found = "a link to nothing" if path.is_symlink() else "nothing"
        raise InputError(str(path), found, "a checkpoint", "check the path")
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(str(path), "neither a file nor a folder", "a checkpoint", "check the path")
    if (path / "adapter_config.json").exists() and not any(path.glob("adapter_model.*")):
        raise InputError(
            str(path),
            "adapter_config.json without weights",
            "adapter_model.safetensors beside it",
            "save the adapter anew",
        )
    for stem in _FOLDER_FILES:
        for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            if (path / name).is_file():
                return path / name
    candidates = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
    if len(candidates) == 1:
        return candidates[0]
    found = (
        f"{len(candidates)} safetensors files, none named model.safetensors" if candidates else "no safetensors file"
    )
    raise InputError(str(path), found, "a folder with one checkpoint", "name the file itself")


def read_header(path: Path) -> Header:
    """Read and check the header(s) of a safetensors file or of the shards that an index JSON names.

    Raises:
        InputError: the file is unreadable, truncated or contradicts itself; names the tensor where one is at fault.
    """
    if path.suffix == ".json":
        return _read_index(path)
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise InputError(
            str(path),
            "a pickle",
            "safetensors, which can be read in parts",
            "convert it: `rpg collect --from` does so once",
        )
    return _read_file(path)


def _read_file(path: Path) -> Header:
    try:
        with open(path, "rb") as file:
            # The library is the judge of the format; what it accepts is parsed again for the offsets, which it keeps.
            with safe_open(path, framework="np"):
                size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    except (OSError, SafetensorError, ValueError) as error:
        where, found = _diagnose(path, error)
        raise InputError(where, found, "a complete safetensors file", _REWRITE) from error
    metadata = entries.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in entries.items():
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise InputError(
                tensor_at(path, name), f"dtype {entry['dtype']}", f"one of {', '.join(DTYPES)}", "convert it before"
            )
        offset = 8 + length + entry["data_offsets"][0]
        tensors[name] = TensorInfo(name, dtype, tuple(entry["shape"]), path, offset)
    return Header(tensors, metadata, {path: size})


def _read_index(path: Path) -> Header:
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(
            str(path), "no weight_map", "the index JSON of a sharded checkpoint", "name it, or a safetensors file"
        )
    extra = index.get("metadata")
    metadata = {key: text for key, text in (extra if isinstance(extra, dict) else {}).items() if isinstance(text, str)}
    tensors: dict[str, TensorInfo] = {}
    sizes: dict[Path, int] = {}
    for shard in sorted(set(weight_map.values()), key=natural_key):
        names = [name for name, file in weight_map.items() if file == shard]
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise InputError(tensor_at(path, names[0]), f"shard {shard!r}", "the name of a file in the same folder")
        file = path.parent / shard
        if not file.is_file():
            raise InputError(
                tensor_at(path, names[0]), f"no shard {shard}", "all shards in the folder", "copy it there"
            )
        header = _read_file(file)
        for name in names:
            if name not in header.tensors:
                raise InputError(tensor_at(file, name), "no such tensor", f"it here, as {path.name} says", _REWRITE)
        for name in header.tensors:
            if weight_map.get(name) != shard:
                raise InputError(tensor_at(file, name), "a tensor too many", f"those of {path.name} alone", _REWRITE)
        tensors |= header.tensors
        sizes |= header.sizes
        # A shard's own order and ties speak of a part only.
        metadata = {k: v for k, v in header.metadata.items() if k not in (ORDER_KEY, TIES_KEY)} | metadata
    return Header(tensors, metadata, sizes)


def ties_of(header: Header, path: Path) -> dict[str, str]:
    """``{alias: stored name}`` from ``rpg.ties`` and from what ``safetensors.torch.save_model`` leaves."""
    recorded = _json_metadata(header, TIES_KEY, path, {})
    if not isinstance(recorded, dict):
        raise InputError(f"{path}: metadata {TIES_KEY}", "no JSON object", "{alias: stored name}", _REWRITE)
    for alias, name in recorded.items():
        if alias in header.tensors or name not in header.tensors:
            raise InputError(
                tensor_at(path, alias),
                f"a tie to {name!r} in metadata {TIES_KEY}",
                "an alias of a stored tensor",
                _REWRITE,
            )
    if ORDER_KEY in header.metadata:  # written by us: other metadata may well say the name of a tensor
        return recorded
    implied = {
        alias: name
        for alias, name in header.metadata.items()
        if alias != "format" and alias not in header.tensors and name in header.tensors
    }
    return implied | recorded


def order_of(header: Header, ties: dict[str, str], path: Path) -> tuple[list[str], bool]:
    """Keys of the state dict in order, aliases included, and whether the file itself records that order."""
    names = [*header.tensors, *ties]
    recorded = _json_metadata(header, ORDER_KEY, path, None)
    if recorded is None:
        return sorted(names, key=natural_key), False
    if not isinstance(recorded, list) or not all(isinstance(name, str) for name in recorded):
        raise InputError(f"{path}: metadata {ORDER_KEY}", "no JSON list of names", "every key once", _REWRITE)
    known = set(names)
    for name in recorded:
        if name not in known:
            raise InputError(tensor_at(path, name), f"it in metadata {ORDER_KEY} alone", "every key once", _REWRITE)
        known.remove(name)
    if known:
        raise InputError(
            tensor_at(path, min(known)), f"it missing from metadata {ORDER_KEY}", "every key once", _REWRITE
        )
    return recorded, True


def tensor_at(path: Path | str, name: str) -> str:
    """How an error names a tensor of a file."""
    return f"{path}: tensor {name!r}"


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises InputError when it cannot be read or is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(str(path), f"no readable JSON ({error})", "a complete JSON file", _REWRITE) from error


def _json_metadata(header: Header, key: str, path: Path, default: Any) -> Any:
    if key not in header.metadata:
        return default
    try:
        return json.loads(header.metadata[key])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: metadata {key}", f"no JSON ({error})", "JSON", _REWRITE) from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} twice in the header")
    return entries


def _diagnose(path: Path, error: Exception) -> tuple[str, str]:
    """(where, found) for a file that was refused, with the tensor at fault if the header can be parsed so far."""
    if path.is_dir():
        return str(path), "a folder"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    reason = reason.removeprefix("Error while deserializing header: ")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                return str(path), f"{size} bytes, fewer than its header announces ({reason})"
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        end, last = 0, ""
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            if not 0 <= start <= stop:
                return tensor_at(path, name), f"bytes {start} to {stop}"
            if 8 + length + stop > size:
                return tensor_at(path, name), f"{size} bytes, {8 + length + stop - size} too few to hold it"
            if start < end:
                return tensor_at(path, name), f"bytes that overlap those of {last!r}"
            dtype = DTYPES.get(entry["dtype"])
            if dtype is not None and math.prod(entry["shape"]) * dtype.itemsize != stop - start:
                return tensor_at(path, name), f"shape {entry['shape']} of {entry['dtype']} in {stop - start} bytes"
            if start > end:
                return tensor_at(path, name), f"{start - end} bytes before it that belong to no tensor"
            end, last = stop, name
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return str(path), f"an unreadable file ({reason})"

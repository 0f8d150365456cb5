"""Where the tensors of a checkpoint lie on disk, read from checked safetensors headers."""

from __future__ import annotations

import contextlib
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

_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
    "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {code: getattr(torch, n) for code, n in _NAMES.items() if hasattr(torch, n)}
CODES = {dtype: code for code, dtype in DTYPES.items()}
"""What the format calls a dtype, and the other way round."""

DTYPES_BY_NAME = {_NAMES[code]: dtype for code, dtype in DTYPES.items()}
"""Dtypes by their names in torch, ``float32``."""

TensorSpec = tuple[torch.dtype, tuple[int, ...]]
"""Stored dtype and shape of a tensor."""

_POWERS_OF_TWO = getattr(torch, "float8_e8m0fnu", None)


def dtype_name(dtype: torch.dtype) -> str:
    """What torch calls a dtype: ``float32``."""
    return str(dtype).removeprefix("torch.")


def is_learned(dtype: torch.dtype) -> bool:
    """Whether values of a dtype are numbers on a scale; codes, counters and scales that are exponents alone are not."""
    return (dtype.is_floating_point or dtype.is_complex) and dtype != _POWERS_OF_TWO


# Folders written by timm, transformers, diffusers and PEFT, in the order in which they are looked for.
_FOLDER_FILES = ("adapter_model", "model", "diffusion_pytorch_model")
_REWRITE = "copy or save it again"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``num_values`` values of ``dtype`` from byte ``offset`` of ``file`` on.

    ``finite`` is false where a zoo knows that NaN or infinite values are among them, the same in all its checkpoints.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    finite: bool = True

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape."""
        return self.dtype, self.shape

    @property
    def num_values(self) -> int:
        """How many values it has: 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """How many bytes of the file they take."""
        return self.num_values * self.dtype.itemsize

    @property
    def learned(self) -> bool:
        """Whether its values can be learned: numbers, all of them finite."""
        return self.finite and self.num_values > 0 and is_learned(self.dtype)

    @property
    def averaged(self) -> bool:
        """Whether averages of it are of use: what is learned, complex numbers apart."""
        return self.learned and not self.dtype.is_complex


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
        what = "is a link to nothing" if path.is_symlink() else "does not exist"
        raise InputError(f"{path} {what}; name a checkpoint that is there")
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"{path} is neither a file nor a folder; name a checkpoint")
    if (path / "adapter_config.json").exists() and not any(path.glob("adapter_model.*")):
        raise InputError(f"{path} has an adapter_config.json without weights beside it; save the adapter again")
    for stem in _FOLDER_FILES:
        for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            if (path / name).is_file():
                return path / name
    candidates = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
    if len(candidates) == 1:
        return candidates[0]
    what = f"{len(candidates)} safetensors files, none named model.safetensors" if candidates else "no safetensors file"
    raise InputError(f"{path} has {what}; name the checkpoint's own file or folder")


def read_header(path: Path) -> Header:
    """Read the header(s) of a safetensors file or of the shards that an index names. Raises InputError if broken."""
    return _read_index(path) if path.suffix == ".json" else _read_file(path)


def _read_file(path: Path) -> Header:
    try:
        with open(path, "rb") as file:
            # The library is the judge of the format; what it accepts is parsed again for the offsets, which it keeps.
            with safe_open(path, framework="np"):
                size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{_diagnose(path, error)}; {_REWRITE}") from error
    metadata = entries.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in entries.items():
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            where, known = tensor_at(path, name), ", ".join(DTYPES)
            raise InputError(f"{where} has dtype {entry['dtype']}; convert it to one of {known}")
        offset = 8 + length + entry["data_offsets"][0]
        tensors[name] = TensorInfo(name, dtype, tuple(entry["shape"]), path, offset)
    return Header(tensors, metadata, {path: size})


def _read_index(path: Path) -> Header:
    index = read_json(path)
    files, listed = shards_of(index, path), weight_map(index)
    extra = index.get("metadata")
    metadata = {key: text for key, text in (extra if isinstance(extra, dict) else {}).items() if isinstance(text, str)}
    tensors: dict[str, TensorInfo] = {}
    sizes: dict[Path, int] = {}
    for file in files:
        header = _read_file(file)
        for name, shard in listed.items():
            if shard == file.name and name not in header.tensors:
                raise InputError(f"{tensor_at(file, name)} is missing, though {path.name} lists it; {_REWRITE}")
        for name in header.tensors:
            if listed.get(name) != file.name:
                raise InputError(f"{tensor_at(file, name)} is not listed in {path.name}; {_REWRITE}")
        tensors |= header.tensors
        sizes |= header.sizes
        # A shard's own order and ties speak of a part only.
        metadata = {k: v for k, v in header.metadata.items() if k not in (ORDER_KEY, TIES_KEY)} | metadata
    return Header(tensors, metadata, sizes)


def weight_map(index: Any) -> dict[str, str]:
    """The shard of each tensor, as the content of an index JSON says; empty if it says nothing."""
    found = index.get("weight_map") if isinstance(index, dict) else None
    return found if isinstance(found, dict) and all(isinstance(shard, str) for shard in found.values()) else {}


def shards_of(index: Any, path: Path) -> list[Path]:
    """The shards that the content of the index JSON at ``path`` names.

    Raises InputError if there are none, or one is not a file of the same folder; names a tensor in it.
    """
    names = {shard: name for name, shard in reversed(weight_map(index).items())}
    if not names:
        what = f"{path} has no weight_map"
        raise InputError(f"{what}; name the index JSON of a sharded checkpoint, or a safetensors file")
    for shard, name in names.items():
        if Path(shard).name != shard or shard in ("", ".", ".."):
            what = f"{tensor_at(path, name)} is said to be in {shard!r}"
            raise InputError(f"{what}; a shard is a file of the same folder")
        if not (path.parent / shard).is_file():
            what = f"{tensor_at(path, name)} is in the shard {shard}, which is not in the folder"
            raise InputError(f"{what}; copy it there")
    return [path.parent / shard for shard in sorted(names, key=natural_key)]


def ties_of(header: Header, path: Path) -> dict[str, str]:
    """``{alias: stored name}`` from ``rpg.ties``, or as `safetensors.torch.save_model` says what it left out.

    That writes a key for each left out name, and the name of the tensor that is the same for its text. Where other
    programs have written metadata too (``format``), one of theirs may hold a tensor's name (``best: weight``);
    there, only two names of one parameter, ``head.weight`` and ``embed.weight``, are a tie.
    """
    metadata = header.metadata
    if TIES_KEY not in metadata and ORDER_KEY not in metadata:
        missing = {a: n for a, n in metadata.items() if a not in header.tensors and n in header.tensors}
        return {a: n for a, n in missing.items() if "format" not in metadata or _leaf(a) == _leaf(n)}
    ties = _json_metadata(header, TIES_KEY, path, {})
    if not isinstance(ties, dict):
        raise InputError(f"{path}: metadata {TIES_KEY} is not a JSON object; {_REWRITE}")
    for alias, name in ties.items():
        if alias in header.tensors or name not in header.tensors:
            what = f"metadata {TIES_KEY} ties it to {name!r}, but a tie is of another key to a stored tensor"
            raise InputError(f"{tensor_at(path, alias)}: {what}; {_REWRITE}")
    return ties


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def order_of(header: Header, ties: dict[str, str], path: Path) -> tuple[list[str], bool]:
    """Keys of the state dict in order, aliases included, and whether the file itself records that order."""
    names = [*header.tensors, *ties]
    recorded = _json_metadata(header, ORDER_KEY, path, None)
    if recorded is None:
        return sorted(names, key=natural_key), False
    if not isinstance(recorded, list) or not all(isinstance(name, str) for name in recorded):
        raise InputError(f"{path}: metadata {ORDER_KEY} is not a JSON list of names; {_REWRITE}")
    unseen = set(names)
    for name in recorded:
        if name not in unseen:
            what = "lists it twice" if name in names else "lists it, but the file does not hold it"
            raise InputError(f"{tensor_at(path, name)}: metadata {ORDER_KEY} {what}; {_REWRITE}")
        unseen.remove(name)
    if unseen:
        raise InputError(f"{tensor_at(path, min(unseen))} is missing from metadata {ORDER_KEY}; {_REWRITE}")
    return recorded, True


def tensor_at(path: Path | str, name: str) -> str:
    """How an error names a tensor of a file."""
    return f"{path}: tensor {name!r}"


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises InputError when it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); {_REWRITE}") from error


def _json_metadata(header: Header, key: str, path: Path, default: Any) -> Any:
    if key not in header.metadata:
        return default
    try:
        return json.loads(header.metadata[key])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: metadata {key} is not JSON ({error}); {_REWRITE}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} twice in the header")
    return entries


def _diagnose(path: Path, error: Exception) -> str:
    """What is wrong with a file that was refused: where it is cut off, else what the library says."""
    if path.is_dir():
        return f"{path} is a folder"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    reason = reason.removeprefix("Error while deserializing header: ")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                return f"{path} has {size} bytes, fewer than its header announces ({reason})"
            entries = json.loads(file.read(length))
        for name, entry in entries.items():
            if name != "__metadata__" and (missing := 8 + length + entry["data_offsets"][1] - size) > 0:
                return f"{tensor_at(path, name)} is cut off: {missing} bytes are missing"
    return f"{path} is unreadable ({reason})"

"""The digest of a folder of files, the same however often they are written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tokenization.files import file_digest


def folder_digest(folder: Path, names: Iterable[str]) -> str:
    """SHA-256 over the digests of those of the named files that are there, in the order of ``names``."""
    digest = hashlib.sha256()
    for name in names:
        path = folder / name
        if path.is_file():
            digest.update((_tensors_digest(path) if path.suffix == ".safetensors" else file_digest(path)).encode())
    return digest.hexdigest()


def _tensors_digest(path: Path) -> str:
    """SHA-256 of a safetensors file, its header sorted: the format's writer puts metadata into any order."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

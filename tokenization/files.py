"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from tokenization.errors import InputError

TEMPORARY_SUFFIX = ".partial"


@contextlib.contextmanager
def publish(path: Path | str) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; put it in place when the block ends without an error.

    The bytes are on the disk (fsync) before the name is, so that neither a kill nor a power cut leaves a
    half-written file under ``path``. After an error the temporary file is gone and ``path`` is as it was.

    Raises:
        InputError: the file cannot be written (no space, no permission, a folder in its place).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        try:
            yield temporary
            synchronise(temporary)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        synchronise(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            str(path),
            f"an error on writing ({reason})",
            "a writable place with enough space",
            "free some or choose another",
        ) from error


def publish_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises InputError as ``publish`` does."""
    with publish(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed process left in ``folder``."""
    for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def synchronise(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk. Raises OSError."""
    if path.is_dir() and os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """The file's SHA-256, hexadecimal."""
    with path.open("rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""Files and folders that appear complete or not at all, their digests, and hints about memory pages."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import hashlib
import json
import mmap
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from torch import Tensor

from tokenization.errors import InputError

TEMPORARY_SUFFIX = ".partial"
ASIDE_SUFFIX = ".replaced"
HUGE_PAGE = 2 << 20


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; put it in place when the block ends without an error.

    The bytes are on the disk (fsync) before the name is. After an error or a kill ``path`` is as it was.
    Raises InputError if the file cannot be written (no space, no permission, a folder in its place).
    """
    path = Path(path)
    temporary = temporary_name(path)
    with _cleaned_up(path, temporary):
        yield temporary
        synchronise(temporary)
        os.replace(temporary, path)
        synchronise(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a new folder beside ``path``; put it in the place of ``path`` when the block ends without an error.

    All its files are on the disk before the name is. A folder that was there is moved aside, removed only when the
    new one is in place, and brought back by `recover_folder` if the process was killed in between. Parents are made.
    Raises InputError if the folder cannot be written (no space, no permission, a file in its place).
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()
    temporary = temporary_name(path)
    with _cleaned_up(path, temporary):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(None, "there is a file of this name")
        recover_folder(path)
        remove_abandoned(path.parent, f"{glob.escape(path.name)}.*")
        temporary.mkdir(parents=True)
        yield temporary
        for part in [*temporary.rglob("*"), temporary]:
            synchronise(part)
        if path.exists():  # a folder that is not empty cannot be replaced in one step
            os.replace(path, _aside(path))
        try:
            os.replace(temporary, path)
        except OSError:
            recover_folder(path)
            raise
        synchronise(path.parent)
    shutil.rmtree(_aside(path), ignore_errors=True)


@contextlib.contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Yield a new folder; after the block its files, each of them whole, are put into ``folder``. Raises InputError."""
    temporary = temporary_name(folder / "files")
    with _cleaned_up(folder, temporary):
        temporary.mkdir(parents=True)
        yield temporary
        for file in sorted(temporary.iterdir()):
            synchronise(file)
            os.replace(file, folder / file.name)
        synchronise(folder)
        temporary.rmdir()


def recover_folder(path: Path | str) -> None:
    """Undo what a kill in the last steps of `atomic_folder` left: afterwards ``path`` is the old or the new folder.

    Call it before a folder that may have been replaced is read. Raises OSError.
    """
    path = Path(path)
    aside = _aside(path)
    if not aside.exists():
        return
    shutil.rmtree(aside, ignore_errors=True) if path.exists() else os.replace(aside, path)


def recover_folders(parent: Path) -> None:
    """The same for every folder in ``parent``."""
    for aside in parent.glob(f".*{ASIDE_SUFFIX}"):
        recover_folder(aside.with_name(aside.name.removeprefix(".").removesuffix(ASIDE_SUFFIX)))


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises InputError as `atomic_file` does."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_lines(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in the text of a JSONL file, each after where it stands, ``FILE: line 3``; empty lines are left out.

    Raises InputError that names a line which is not a JSON object.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not complete JSON ({error}); write one JSON object a line") from error
        if not isinstance(parsed, dict):
            raise InputError(f"{where} is of type {type(parsed).__name__}; write one JSON object a line")
        yield where, parsed


def make_folder(path: Path) -> None:
    """Make a folder and its parents, if it is not there. Raises InputError if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise writing_failed(path, error) from error


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders that a killed process left in ``folder``."""
    for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        _remove(leftover)


def remove_folder(folder: Path) -> None:
    """Delete a folder, if it is there: its name goes at once, so that a kill leaves no part of it under that name."""
    temporary = temporary_name(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.replace(folder, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def temporary_name(path: Path) -> Path:
    """What ``path`` is called while this process fills it: the name tells machine and process."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}{TEMPORARY_SUFFIX}")


def remove_abandoned(folder: Path, pattern: str = "*") -> None:
    """Delete the temporary files in ``folder`` of killed processes of this machine; those of others may be in use."""
    owner = re.compile(rf"\.{re.escape(platform.node())}\.(\d+){re.escape(TEMPORARY_SUFFIX)}")
    for path in folder.glob(f".{pattern}{TEMPORARY_SUFFIX}"):
        match = owner.search(path.name)
        if match and not psutil.pid_exists(int(match[1])):
            _remove(path)


def writing_failed(path: Path | str, error: Exception) -> InputError:
    """What to raise where ``path`` could not be written."""
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(f"{path} could not be written ({reason}); free some space or choose another place")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}{ASIDE_SUFFIX}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _cleaned_up(path: Path, temporary: Path) -> Iterator[None]:
    """Remove ``temporary`` after an error, and say which ``path`` could not be written."""
    try:
        yield
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError | SafetensorError):
            raise writing_failed(path, error) from error
        raise


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


def empty_huge(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.empty`` in huge pages where the system has them: to touch fresh small ones takes longer than to copy."""
    tensor = torch.empty(tuple(shape), dtype=dtype)
    advise = _madvise()
    begin = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
    if advise is not None and end > begin:
        advise(begin, end - begin, mmap.MADV_HUGEPAGE)
    return tensor


def drop_pages(map_begin: int, map_size: int, begin: int, size: int) -> None:
    """Drop the pages of ``size`` bytes at address ``begin`` in a private, unchanged map of a file from this process.

    Whatever else of the map lies in the same large pages goes too; it is mapped again when it is read.
    """
    advise = _madvise()
    if advise is None or not size:
        return
    map_end = map_begin + -(-map_size // mmap.PAGESIZE) * mmap.PAGESIZE
    first = max(map_begin, begin // HUGE_PAGE * HUGE_PAGE)
    last = min(map_end, -(-(begin + size) // HUGE_PAGE) * HUGE_PAGE)
    advise(first, last - first, mmap.MADV_DONTNEED)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):  # elsewhere it is a hint that may do nothing
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function

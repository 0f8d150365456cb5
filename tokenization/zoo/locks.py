"""One command at a time writes a folder: a lock file names the process that does.

The operating system holds the lock (through `filelock`), so it ends with its process, however that ends.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import psutil
import torch
from filelock import BaseFileLock, FileLock, Timeout

from tokenization.errors import InputError
from tokenization.files import recover_folder, recover_folders, remove_abandoned, writing_failed

LOCK_NAME = ".lock"
WAIT = 0.1
"""Seconds to wait for a lock, so that one which is just being given back is taken."""

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Holder:
    """Who writes a folder, as the lock file says: ``started`` in seconds since 1970, ``command`` in two words."""

    host: str
    pid: int
    started: float
    command: str

    @classmethod
    def current(cls) -> Holder:
        """This process."""
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])[:80]
        return cls(platform.node(), os.getpid(), psutil.Process().create_time(), command)

    @classmethod
    def read(cls, file: Path) -> Holder | None:
        """What a lock file says; None where it says nothing of use."""
        try:
            content = json.loads(file.read_bytes())
            return cls(str(content["host"]), int(content["pid"]), float(content["started"]), str(content["command"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def is_ours(self) -> bool:
        """Whether it is this process or one that started it: all of them are one command."""
        with contextlib.suppress(psutil.Error):
            ours = [os.getpid(), *(each.pid for each in psutil.Process().parents())]
            return self.host == platform.node() and self.pid in ours
        return False

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        where = "" if self.host == platform.node() else f" on {self.host}"
        return f"{self.command!r}, process {self.pid}{where} since {since}"


@dataclass
class _Lock:
    """A lock of this process: how often it was taken, and the folders that were made for it, innermost first."""

    pid: int
    held: BaseFileLock
    made: list[Path]
    count: int = 1


_taken: dict[Path, _Lock] = {}


@contextlib.contextmanager
def locked(path: Path | str, *, beside: bool = False, together: bool = True) -> Iterator[None]:
    """Have ``path`` to oneself: no other command that asks for it writes there until the block ends.

    Of several launched processes the first one takes the lock for all, and they enter together, unless ``together`` is
    false. A command, and what it starts, may take its lock again. Temporary files of processes that were killed go.

    Args:
        path: the folder that is written; it is made, and goes if nothing was written.
        beside: the lock lies beside ``path``, which may be a file, or a folder that appears as a whole.

    Raises InputError, on all processes, if another command writes there, or the folder may not be written.
    """
    with lock_scope(path, beside=beside):
        if together:
            _on_first(lambda: take_lock(path, beside=beside))
        else:
            take_lock(path, beside=beside)
        yield


@contextlib.contextmanager
def lock_scope(path: Path | str, *, beside: bool = False) -> Iterator[None]:
    """Give back, when the block ends, the lock that was taken in it with `take_lock`, if it was."""
    file = lock_file(path, beside=beside)
    before = _count(file)
    try:
        yield
    finally:
        if _count(file) > before:
            _give_back(file, before)


def locks(
    find: Callable[..., Path | str | None], *, beside: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Run a function under the lock of the path that ``find`` reads from its arguments; None: no lock."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            path = find(*args, **kwargs)
            with locked(path, beside=beside) if path is not None else contextlib.nullcontext():
                return function(*args, **kwargs)

        return run

    return decorate


def lock_file(path: Path | str, *, beside: bool = False) -> Path:
    """Where the lock of a folder lies, all links followed."""
    path = Path(path).resolve()
    return path.with_name(f".{path.name}{LOCK_NAME}") if beside else path / LOCK_NAME


def take_lock(path: Path | str, *, beside: bool = False) -> None:
    """Take a lock within a `lock_scope`. Raises InputError as `locked` does, on this process alone."""
    path, file = Path(path), lock_file(path, beside=beside)
    if _count(file):
        _taken[file].count += 1
        return
    made: list[Path] = []
    try:
        made = [each for each in (file.parent, *file.parent.parents) if not each.exists()]  # innermost first
        file.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(file, timeout=WAIT, poll_interval=WAIT / 10, thread_local=False)
        held.acquire()
        _taken[file] = _Lock(os.getpid(), held, made)
        try:
            with contextlib.suppress(PermissionError):  # Windows lets nobody write into a locked file
                file.write_text(json.dumps(asdict(Holder.current())))
            remove_abandoned(file.parent, f"{glob.escape(path.name)}.*" if beside else "*")
            recover_folder(path) if beside else recover_folders(path)
        except OSError:
            _give_back(file, 0)
            raise
    except Timeout:
        holder = Holder.read(file)
        if holder is None or not holder.is_ours():
            who = holder or "another process"
            raise InputError(f"{path} is being written ({who}); wait for its end, or choose another place") from None
    except OSError as error:
        _remove_folders(made)
        raise writing_failed(path, error) from error


def _give_back(file: Path, count: int) -> None:
    lock = _taken[file]
    lock.count = count
    if not count:
        del _taken[file]
        with contextlib.suppress(OSError):
            file.unlink()  # while it is held: who waits for it sees that it has gone, and makes a new one
        lock.held.release()
        _remove_folders(lock.made)


def _count(file: Path) -> int:
    """How often this process has taken a lock; one that was forked has taken none."""
    lock = _taken.get(file)
    return lock.count if lock is not None and lock.pid == os.getpid() else 0


def _remove_folders(folders: list[Path]) -> None:
    """Remove the folders, innermost first, as far as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _on_first(action: Callable[[], object]) -> None:
    """Run ``action`` on the first of several launched processes; what it raises, all of them raise.

    Before they know one another the others go on: the launcher ends them where the first one fails.
    """
    distributed: Any = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        if os.environ.get("RANK", "0") == "0":
            action()
        return
    failure: list[InputError | None] = [None]
    if distributed.get_rank() == 0:
        try:
            action()
        except InputError as error:
            failure = [error]
    distributed.broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]

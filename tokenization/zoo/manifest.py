"""``zoo.json``, which describes a zoo's checkpoints, and its manifest: one JSON line a checkpoint.

A line is appended only after the checkpoint's file is in place."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenization.checkpoint.checkpoint import Checkpoint, Structure, digest_of
from tokenization.checkpoint.safetensors import read_json
from tokenization.errors import InputError
from tokenization.files import atomic_file, json_lines, write_text, writing_failed
from tokenization.zoo.condition import ConditionSpec


@dataclass(frozen=True)
class ZooEntry:
    """One line of the manifest, field by field as in docs/formats.md.

    ``file`` is relative to the zoo, or a path that leaves it if ``external``; ``size`` is in bytes, ``sha256``
    hexadecimal, 0 and empty if not recorded; ``source`` is what the file was converted from.
    """

    file: str
    run: int
    step: int
    condition: tuple[float, ...] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    split: str = "train"
    size: int = 0
    sha256: str = ""
    source: str = ""
    external: bool = False

    def to_line(self) -> str:
        """The manifest line, with its newline."""
        content = dataclasses.asdict(self)
        optional = {"size": 0, "sha256": "", "source": "", "external": False}
        content = {key: value for key, value in content.items() if key not in optional or value != optional[key]}
        return json.dumps(content, allow_nan=False) + "\n"


_FIELDS = {f.name: f for f in dataclasses.fields(ZooEntry)}


def entry_of(content: Mapping[str, Any], where: str) -> ZooEntry:
    """Check the fields of one entry. Raises InputError that names ``where`` and the field at fault."""

    def refuse(key: str, expected: str) -> InputError:
        return InputError(f"{where}: field {key!r} is {content.get(key)!r}; write {expected}")

    for key in content:
        if key not in _FIELDS:
            raise InputError(f"{where}: field {key!r} is unknown; the fields are {', '.join(_FIELDS)}")
    for key in ("file", "run", "step"):
        if key not in content:
            raise InputError(f"{where}: field {key!r} is missing; add it")
    values = dict(content)
    for key in ("file", "split", "sha256", "source"):
        if key in values and not isinstance(values[key], str):
            raise refuse(key, "a text")
    for key in ("run", "step", "size"):
        value = values.get(key, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise refuse(key, "a whole number from 0 on")
    for key in ("file", "split"):
        if not _is_name(values.get(key, "train")):
            raise refuse(key, "a name")
    if not isinstance(values.get("external", False), bool):
        raise refuse("external", "true or false")
    if values.get("condition") is not None:
        condition = values["condition"]
        if not isinstance(condition, list | tuple) or not all(_is_number(value) for value in condition):
            raise refuse("condition", "a list of finite numbers")
        values["condition"] = tuple(float(value) for value in condition)
    metrics = values.get("metrics", {})
    if not isinstance(metrics, dict) or not all(_is_number(value) for value in metrics.values()):
        raise refuse("metrics", "finite numbers by name")
    return ZooEntry(**values)


def with_digest(entry: ZooEntry, checkpoint: Checkpoint) -> ZooEntry:
    """The entry with size and digest of its checkpoint's file(s)."""
    return dataclasses.replace(entry, size=sum(checkpoint.sizes.values()), sha256=digest_of(checkpoint))


def read_manifest(path: Path, *, repair: bool = False) -> list[ZooEntry]:
    """Read every line; with ``repair``, cut off a last one that a killed process left unfinished.

    Raises InputError that names a line which is cut in half, malformed, or lists a file a second time.
    """
    try:
        content = path.read_bytes()
        last = content.rpartition(b"\n")[2]
        if not _is_json(last):
            if not repair:
                what = f"{path}: line {content.count(10) + 1} is a line cut in half"
                raise InputError(f"{what}; collect again, which drops it and continues")
            os.truncate(path, len(content) - len(last))
            content = content.removesuffix(last)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path} is unreadable ({reason}); put the manifest of the zoo there") from error
    entries: list[ZooEntry] = []
    seen: dict[str, str] = {}
    for where, parsed in json_lines(text, path):
        entries.append(entry := entry_of(parsed, where))
        if entry.file in seen:
            raise InputError(
                f"{where} lists {entry.file!r} a second time, after {seen[entry.file]}; drop one of the lines"
            )
        seen[entry.file] = where.rpartition(": ")[2]
    return entries


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.strip() or b"null")
    except (ValueError, RecursionError):
        return False
    return True


def append_lines(path: Path, entries: Sequence[ZooEntry], expected_size: int) -> int:
    """Append entries durably, all or none, even if the process is killed; return the new size of the file in bytes.

    Raises InputError if it has not the ``expected_size`` (another process collects too), or the disk refuses.
    """
    data = "".join(entry.to_line() for entry in entries).encode()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise writing_failed(path, error) from error
    try:
        size = os.lseek(descriptor, 0, os.SEEK_END)
        if size != expected_size:
            what = f"{path} has {size} bytes, but had {expected_size} when it was last read"
            raise InputError(f"{what}; let one process at a time collect")
        if size:
            os.lseek(descriptor, -1, os.SEEK_END)
            if os.read(descriptor, 1) != b"\n":  # an editor left the last line without its end
                data = b"\n" + data
        if len(entries) > 1:  # a kill may cut a long write anywhere, between two lines too
            with atomic_file(path) as temporary:
                temporary.write_bytes(os.pread(descriptor, size, 0) + data)
            return size + len(data)
        try:
            remaining = data
            while remaining:
                remaining = remaining[os.write(descriptor, remaining) :]
            os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, size)
            raise
    except OSError as error:
        raise writing_failed(path, error) from error
    finally:
        os.close(descriptor)
    return size + len(data)


def _is_name(text: str) -> bool:
    """Whether it can be a path: systems take no NUL, and 255 bytes a part at most."""
    parts = text.encode(errors="surrogatepass").split(b"/")
    return bool(text) and "\0" not in text and max(map(len, parts)) < 256 and sum(map(len, parts)) < 4000


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


FORMAT = 1
"""Version of the zoo format; it changes when older programs would misread a zoo."""


@dataclass(frozen=True)
class Description:
    """Task, condition, names of the runs, and structure (None while the zoo is empty)."""

    task: dict[str, Any] | None
    condition: ConditionSpec | None
    runs: Sequence[str]
    structure: Structure | None

    @classmethod
    def read(cls, path: Path) -> Description:
        """Read ``zoo.json``. Raises InputError that names the field at fault."""
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            what = f"has format {content.get('format')!r}" if isinstance(content, dict) else "is not a JSON object"
            raise InputError(f"{path} {what}, not format {FORMAT}; collect the zoo again with this version of rpg")
        task, runs = content.get("task"), content.get("runs", [])
        condition, structure = content.get("condition"), content.get("structure")
        if task is not None and not isinstance(task, dict):
            raise InputError(f"{path}: task is {task!r}; write null, or a task's name and arguments")
        if not isinstance(runs, list) or not all(isinstance(run, str) for run in runs):
            raise InputError(f"{path}: runs is {runs!r}; write a list of names")
        return cls(
            task,
            None if condition is None else ConditionSpec.from_json(condition, str(path)),
            runs,
            None if structure is None else Structure.from_json(structure, str(path)),
        )

    def to_text(self) -> str:
        """What ``zoo.json`` holds."""
        content = {
            "format": FORMAT,
            "task": self.task,
            "condition": None if self.condition is None else self.condition.to_json(),
            "runs": list(self.runs),
            "structure": None if self.structure is None else self.structure.to_json(),
        }
        return json.dumps(content, indent=1) + "\n"

    def write(self, path: Path) -> None:
        """Write ``zoo.json`` atomically. Raises InputError if the disk refuses."""
        write_text(path, self.to_text())


def require_new_folder(path: Path, among: Sequence[Path] = ()) -> None:
    """Check that a zoo may be made in a folder: it is new or empty, or holds one of the checkpoints ``among``.

    Raises InputError if there is a zoo, a file, or a folder full of something else.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; choose a folder for the zoo")
    if (path / "zoo.json").exists():
        raise InputError(f"{path} is a zoo already; open it, or choose another folder")
    try:  # hidden files are the system's
        names = {file.name for file in path.iterdir() if not file.name.startswith(".")} if path.exists() else set()
    except OSError as error:
        raise InputError(f"{path} is unreadable ({error.strerror}); choose another folder for the zoo") from error
    manifest = path / "manifest.jsonl"
    unfinished = names == {manifest.name} and manifest.stat().st_size == 0  # killed while a zoo was being made
    if names and not unfinished and not any(file.resolve().is_relative_to(path.resolve()) for file in among):
        what = f"{path} is not a zoo, and not empty (it has {min(names)})"
        raise InputError(f"{what}; choose a new folder, or the one that holds the checkpoints")

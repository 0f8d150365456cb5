"""A zoo: a folder of checkpoints of one structure.

``zoo.json`` says what they are (format, task, condition, structure), ``manifest.jsonl`` lists them, one line each.
A line is appended after its file is in place, so that a killed collection resumes and never lists half a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint, save_checkpoint
from tokenization.checkpoint.pickles import check_tensors
from tokenization.checkpoint.structure import Structure, check_checkpoint_values, check_values, digest_of
from tokenization.errors import InputError
from tokenization.files import publish_text, remove_leftovers, writing_failed
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.description import Description
from tokenization.zoo.manifest import ZooEntry, append_lines, entry_of, read_manifest

__all__ = ["ConditionSpec", "Zoo", "ZooEntry"]


class Zoo:
    """A folder of checkpoints of one structure. Make one with `create`, open one with `open`.

    Attributes:
        path: the folder.
        task: the task's name and arguments as the task wrote them, or None.
        condition: what the entries' conditions mean, or None.
        runs: what the training runs are called, where they came with names.
        entries: one per checkpoint, in the order of their collection.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        task: dict[str, Any] | None = None,
        condition: ConditionSpec | None = None,
        runs: Sequence[str] = (),
    ) -> None:
        self.path = Path(path)
        self.task = task
        self.condition = condition
        self.runs = list(runs)
        self.entries: list[ZooEntry] = []
        self._structure: Structure | None = None
        self._manifest_size = 0
        self._checkpoints: dict[int, Checkpoint] = {}

    @classmethod
    def create(
        cls,
        path: Path | str,
        *,
        task: dict[str, Any] | None = None,
        condition: ConditionSpec | None = None,
        runs: Sequence[str] = (),
    ) -> Zoo:
        """Start an empty zoo. Raises InputError if there is one, or if the folder cannot be written."""
        zoo = cls(path, task=task, condition=condition, runs=runs)
        if zoo.path.exists() and not zoo.path.is_dir():
            raise InputError(str(path), "a file", "a folder for the zoo", "choose another path")
        for name in ("zoo.json", "manifest.jsonl"):
            if (zoo.path / name).exists():
                raise InputError(
                    str(zoo.path / name), "a zoo already", "a new folder", "open it, or choose another path"
                )
        try:
            zoo.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise writing_failed(path, error) from error
        # A zoo is what has a zoo.json: it comes last.
        publish_text(zoo.path / "manifest.jsonl", "")
        zoo._write_description()
        return zoo

    @classmethod
    def open(cls, path: Path | str, *, repair: bool = False) -> Zoo:
        """Open a zoo; headers and values of its checkpoints are read later, as they are used.

        Args:
            path: the folder.
            repair: drop what a killed collection left: an unfinished last line, temporary files.

        Raises:
            InputError: there is no zoo, its files are malformed, or an entry's file is missing or out of bounds.
        """
        path = Path(path)
        description = path / "zoo.json"
        if not path.is_dir() or not description.is_file():
            found = "no zoo.json" if path.is_dir() else "no such folder"
            raise InputError(str(path), found, "a zoo", "make one with `rpg collect`")
        content = Description.read(description)
        zoo = cls(path, task=content.task, condition=content.condition, runs=content.runs)
        zoo._structure = content.structure
        if repair:
            remove_leftovers(path)
            remove_leftovers(path / "checkpoints")
        zoo.entries = read_manifest(path / "manifest.jsonl", repair=repair)
        zoo._manifest_size = (path / "manifest.jsonl").stat().st_size
        for entry in zoo.entries:
            zoo._require_entry(entry)
        return zoo

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def num_runs(self) -> int:
        """How many training runs the entries' ``run`` counts: the highest + 1."""
        return max((entry.run for entry in self.entries), default=-1) + 1

    @property
    def structure(self) -> Structure:
        """What all checkpoints have in common. Raises InputError if the zoo is empty."""
        if self._structure is None:
            # A kill between the first line and zoo.json: the first checkpoint says the same.
            self._structure = Structure.of_checkpoint(Checkpoint.open(self.file(0)))
        return self._structure

    def file(self, index: int) -> Path:
        """The file or folder of an entry. Raises InputError if the zoo is empty or has no such entry."""
        if not self.entries:
            raise InputError(str(self.path), "an empty zoo", "at least one checkpoint", "collect some")
        if not -len(self) <= index < len(self):
            raise InputError(str(self.path), f"no entry {index}", f"an index from 0 to {len(self) - 1}")
        return self.path / self.entries[index].file

    def contains(self, file: Path) -> bool:
        """Whether a file lies in the zoo's folder, all links followed."""
        return file.resolve().is_relative_to(self.path.resolve())

    def checkpoint(self, index: int) -> Checkpoint:
        """Open the checkpoint of an entry lazily; it is kept for the next call.

        Raises:
            InputError: the file is broken, has changed since its collection, or is of another structure.
        """
        self.file(index)
        index %= len(self)
        if index not in self._checkpoints:
            self._checkpoints[index] = self._open_checkpoint(index)
        return self._checkpoints[index]

    def state_dict(self, index: int) -> dict[str, Tensor]:
        """Every tensor of an entry's checkpoint, copied into memory."""
        return self.checkpoint(index).state_dict()

    def subset(self, split: str) -> list[int]:
        """Indices of the entries of a split; empty if there are none."""
        return [index for index, entry in enumerate(self.entries) if entry.split == split]

    def require_task(self) -> dict[str, Any]:
        """The task. Raises InputError if the zoo was collected without one."""
        if self.task is None:
            raise InputError(f"{self.path / 'zoo.json'}: task", "none", "a task's name and arguments", "name the task")
        return self.task

    def append(
        self,
        state_dict: Mapping[str, Tensor],
        *,
        run: int,
        step: int,
        condition: Sequence[float] | None = None,
        metrics: Mapping[str, float] | None = None,
        split: str = "train",
        source: str = "",
    ) -> ZooEntry:
        """Write a state dict into the zoo and list it.

        Args:
            state_dict: the tensors; the first one sets the structure of the zoo.
            run, step, condition, metrics, split, source: as in `ZooEntry`.

        Raises:
            InputError: another structure, NaN or infinity, a wrong condition, no space; the zoo is as it was.
        """
        number = len(self)
        while (self.path / (name := f"checkpoints/{number:06d}.safetensors")).exists():  # never overwrite a stranger
            number += 1
        path = self.path / name
        where = source or str(path)
        entry = entry_of(
            {
                "file": name,
                "run": run,
                "step": step,
                "condition": condition if condition is None else [float(value) for value in condition],
                "metrics": dict(metrics or {}),
                "split": split,
                "source": source,
            },
            where,
        )
        self._require_condition(entry, where)
        tensors = check_tensors(state_dict, where)
        structure = Structure.of_state_dict(tensors)
        if self.entries:
            self.structure.require(structure, where)
        check_values(tensors, where)
        new_folder = not path.parent.exists()
        try:
            path.parent.mkdir(exist_ok=True)
            save_checkpoint(path, tensors)
            entry = with_digest(entry, Checkpoint.open(path))
            self.extend([entry])
        except BaseException as error:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                if new_folder:
                    path.parent.rmdir()
            if isinstance(error, OSError):
                raise writing_failed(path, error) from error
            raise
        return entry

    def extend(self, entries: Sequence[ZooEntry]) -> None:
        """List checkpoints that are in place already, all or none of them.

        The caller vouches for their structure and values; `verify` checks them at any time.

        Raises:
            InputError: a file is missing or out of bounds, is listed already, or the disk refuses.
        """
        if not entries:
            return
        listed = {entry.file for entry in self.entries}
        for entry in entries:
            self._require_entry(entry)
            if entry.file in listed:
                raise InputError(str(self.path / entry.file), "a file that the zoo lists already", "a new one")
            listed.add(entry.file)
        manifest = self.path / "manifest.jsonl"
        old_size, was_empty = self._manifest_size, not self.entries
        self._manifest_size = append_lines(manifest, entries, old_size)
        self.entries.extend(entries)
        if was_empty:
            try:
                self._structure = None
                self._structure = self.structure
                self._write_description()
            except BaseException:
                self.entries.clear()
                self._structure = None
                os.truncate(manifest, old_size)
                self._manifest_size = old_size
                raise

    def rename_runs(self, runs: Sequence[str]) -> None:
        """Set what the runs are called. Raises InputError if the disk refuses."""
        self.runs = list(runs)
        self._write_description()

    def verify(self) -> None:
        """Read every checkpoint and check structure, values and digest.

        Raises:
            InputError: at the first fault, naming file and tensor; also for an empty zoo.
        """
        self.file(0)
        for index, entry in enumerate(self.entries):
            where = str(self.file(index))
            checkpoint = self._open_checkpoint(index)  # not kept: a whole zoo would stay in memory
            check_checkpoint_values(checkpoint, where)
            if entry.sha256 and (found := digest_of(checkpoint)) != entry.sha256:
                raise InputError(
                    where, f"digest {found[:12]}…", f"{entry.sha256[:12]}… as collected", "collect it again"
                )

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the structure and of every file's digest in the order of the entries.

        It costs no reading: the files' digests were taken when they were collected.
        """
        digest = hashlib.sha256(json.dumps(self.structure.to_json()).encode())
        for index, entry in enumerate(self.entries):
            digest.update((entry.sha256 or digest_of(self._open_checkpoint(index))).encode())
        return digest.hexdigest()

    def _open_checkpoint(self, index: int) -> Checkpoint:
        path = self.file(index)
        checkpoint = Checkpoint.open(path)
        for file in checkpoint.sizes:  # a folder or an index may lead elsewhere still
            if not self.entries[index].external and not self.contains(file):
                raise InputError(
                    str(file), "a link out of the zoo", "a file in the zoo", "adopt it with `rpg collect --from`"
                )
        size, expected = sum(checkpoint.sizes.values()), self.entries[index].size
        if expected and size != expected:
            raise InputError(str(path), f"{size} bytes", f"{expected} as collected", "collect it again")
        self.structure.require(Structure.of_checkpoint(checkpoint), str(path))
        return checkpoint

    def _require_entry(self, entry: ZooEntry) -> None:
        where = f"{self.path / 'manifest.jsonl'}: file {entry.file!r}"
        file = self.path / entry.file
        if not entry.external and not self.contains(file):
            found = "a symbolic link out of the zoo" if file.is_symlink() else "a path out of the zoo"
            raise InputError(where, found, "a file in the zoo", "adopt it with `rpg collect --from`")
        if not file.exists():
            raise InputError(where, "no such file", "a checkpoint", "put it back, or drop the line")
        self._require_condition(entry, where)

    def _require_condition(self, entry: ZooEntry, where: str) -> None:
        if self.condition is not None:
            self.condition.require(entry.condition, where)
        elif entry.condition is not None:
            raise InputError(f"{where}: condition", "one", "none, as zoo.json says", "create the zoo with a condition")

    def _write_description(self) -> None:
        Description(self.task, self.condition, self.runs, self._structure).write(self.path / "zoo.json")


def with_digest(entry: ZooEntry, checkpoint: Checkpoint) -> ZooEntry:
    """The entry with size and digest of its checkpoint's file(s)."""
    return dataclasses.replace(entry, size=sum(checkpoint.sizes.values()), sha256=digest_of(checkpoint))

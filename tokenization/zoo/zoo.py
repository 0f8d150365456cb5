"""A zoo: a folder of checkpoints of one structure.

``zoo.json`` says what they are (format, task, condition, structure), ``manifest.jsonl`` lists them, one line each.
A line is appended after its file is in place, so that a killed collection resumes and never lists half a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenization.checkpoint.checkpoint import (
    Checkpoint,
    StateDict,
    Structure,
    digest_of,
    same_tensors,
    save_checkpoint,
)
from tokenization.checkpoint.weights import check_tensors
from tokenization.errors import InputError
from tokenization.files import make_folder, remove_leftovers, write_text
from tokenization.zoo.comparison import Comparison
from tokenization.zoo.condition import ConditionSpec, require_condition
from tokenization.zoo.hub import fetch_zoo, publish_zoo
from tokenization.zoo.manifest import (
    Description,
    ZooEntry,
    append_lines,
    entry_of,
    read_manifest,
    require_new_folder,
    with_digest,
)

__all__ = ["ConditionSpec", "Zoo", "ZooEntry", "with_digest"]


class Zoo:
    """A folder of checkpoints of one structure. Make one with `create`, open one with `open` or `from_hub`.

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
        structure: Structure | None = None,
    ) -> None:
        self.path = Path(path)
        self.task, self.condition, self.runs, self._structure = task, condition, list(runs), structure
        self.entries: list[ZooEntry] = []
        self._comparison: Comparison | None = None
        self._manifest_size = 0
        self._checkpoints: dict[Path, Checkpoint] = {}

    @classmethod
    def create(
        cls,
        path: Path | str,
        *,
        task: dict[str, Any] | None = None,
        condition: ConditionSpec | None = None,
        runs: Sequence[str] = (),
        structure: Structure | None = None,
        among: Sequence[Path] = (),
    ) -> Zoo:
        """Start an empty zoo in a new or empty folder, or one that holds one of the checkpoints ``among``.

        Without a ``structure`` the first checkpoint sets it. Raises InputError if the folder is not free or refuses.
        """
        zoo = cls(path, task=task, condition=condition, runs=runs, structure=structure)
        require_new_folder(zoo.path, among)
        make_folder(zoo.path)
        # A zoo is what has a zoo.json: it comes last.
        write_text(zoo.path / "manifest.jsonl", "")
        zoo._write_description()
        return zoo

    @classmethod
    def open(cls, path: Path | str, *, repair: bool = False) -> Zoo:
        """Open a zoo; headers and values of its checkpoints are read later, as they are used.

        ``repair`` cleans up after a killed collection: an unfinished last line or description, temporary files.

        Raises InputError if there is no zoo, its files are malformed, or an entry's file is missing or out of bounds.
        """
        path = Path(path)
        if not (path / "zoo.json").is_file():
            what = "is not a zoo: it has no zoo.json" if path.is_dir() else "does not exist"
            raise InputError(f"{path} {what}; make a zoo with `rpg collect`")
        content = Description.read(path / "zoo.json")
        zoo = cls(path, **vars(content))
        if repair:
            remove_leftovers(path)
            remove_leftovers(path / "checkpoints")
        zoo.entries = read_manifest(path / "manifest.jsonl", repair=repair)
        zoo._manifest_size = (path / "manifest.jsonl").stat().st_size
        for entry in zoo.entries:
            zoo._require_entry(entry)
        if repair and zoo.entries and content.structure is None:
            zoo._write_description()
        return zoo

    @classmethod
    def from_hub(cls, repo: str, path: Path | str | None = None, **options: Any) -> Zoo:
        """Open a zoo that lies on the Hugging Face hub.

        Args:
            repo: id of the data set, ``name/zoo``.
            path: a new folder for it; without one it lies in the hub's cache of assets, and is fetched once a commit.
            options: as of `tokenization.zoo.hub.pull`.

        Raises:
            InputError: there is no such zoo, it cannot be fetched, or it names files outside itself.
        """
        return cls.open(fetch_zoo(repo, None if path is None else Path(path), **options))

    def push_to_hub(self, repo: str, **options: Any) -> str:
        """Publish the zoo as the data set ``name/zoo``, adopted checkpoints with it; paths of this machine stay out.

        ``options`` are ``private``, ``branch``, ``token`` and ``message`` (`tokenization.zoo.hub.publish`).
        Raises InputError if the zoo is empty or damaged, or the hub refuses or cannot be reached.
        """
        checkpoints = [(entry, self.checkpoint(index)) for index, entry in enumerate(self.entries)]
        content = Description(self.task, self.condition, self.runs, self.structure)
        return publish_zoo(self.path, content, checkpoints, repo, **options)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        runs = len({entry.run for entry in self.entries})
        return f"Zoo({str(self.path)!r}): {len(self)} checkpoints of {runs} run(s)"

    @property
    def num_runs(self) -> int:
        """How many training runs the entries' ``run`` counts: the highest + 1."""
        return max((entry.run for entry in self.entries), default=-1) + 1

    @property
    def structure(self) -> Structure:
        """What all checkpoints have in common. Raises InputError if the zoo is empty."""
        if self._structure is None:
            # The first checkpoint says it, also after a kill between the first line and zoo.json.
            first = Checkpoint.open(self.file(0))
            comparison = Comparison(Structure.of_checkpoint(first))
            comparison.add_checkpoint(first, str(first.path))
            self._structure = comparison.structure
        return self._structure

    def file(self, index: int) -> Path:
        """The file or folder of an entry. Raises InputError if the zoo is empty or has no such entry."""
        if not self.entries:
            raise InputError(f"{self.path} is an empty zoo; collect some checkpoints with `rpg collect`")
        if not -len(self) <= index < len(self):
            raise InputError(f"{self.path} has no entry {index}; choose one from 0 to {len(self) - 1}")
        return self.path / self.entries[index].file

    def contains(self, file: Path) -> bool:
        """Whether a file lies in the zoo's folder, all links followed."""
        return file.resolve().is_relative_to(self.path.resolve())

    def checkpoint(self, index: int) -> Checkpoint:
        """Open the checkpoint of an entry lazily; it is kept for the next call.

        Raises InputError if the file is broken, has changed since its collection, or is of another structure.
        """
        file = self.file(index)
        if file not in self._checkpoints:
            self._checkpoints[file] = self._open_checkpoint(index)
        return self._checkpoints[file]

    def state_dict(self, index: int) -> dict[str, Tensor]:
        """Every tensor of an entry's checkpoint, copied into memory."""
        return self.checkpoint(index).state_dict()

    def subset(self, split: str) -> list[int]:
        """Indices of the entries of a split; empty if there are none."""
        return [index for index, entry in enumerate(self.entries) if entry.split == split]

    def metric_values(self, indices: Sequence[int], name: str) -> list[float]:
        """A metric of entries. Raises InputError if one of them lacks it."""
        for entry in (self.entries[index] for index in indices):
            if name not in entry.metrics:
                what = f"{self.path / 'manifest.jsonl'}: {entry.file} has no metric {name!r}"
                known = ", ".join(entry.metrics) or "none"
                raise InputError(f"{what} (it has {known}); set model.condition.name to one that all have")
        return [self.entries[index].metrics[name] for index in indices]

    def require_task(self) -> dict[str, Any]:
        """The task. Raises InputError if the zoo was collected without one."""
        if self.task is None:
            raise InputError(f"{self.path / 'zoo.json'} names no task; set task in the configuration")
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
        """Write a state dict into the zoo and list it; the first one sets the structure, the rest is as in `ZooEntry`.

        Raises InputError for another structure, NaN or infinity, a wrong condition, no space; the zoo is as it was.
        """
        path = _free_place(self.path / "checkpoints", len(self), state_dict)
        saved = path.exists()  # by a collection that was killed before it listed it
        where = source or str(path)
        numbers = condition if condition is None else [float(value) for value in condition]
        fields = {"run": run, "step": step, "condition": numbers, "split": split, "source": source}
        file = path.relative_to(self.path).as_posix()
        entry = entry_of({**fields, "file": file, "metrics": dict(metrics or {})}, where)
        require_condition(self.condition, entry.condition, where)
        tensors = check_tensors(state_dict, where)
        comparison = self._compared() or Comparison(self._structure or Structure.of_state_dict(tensors))
        comparison.add_state_dict(tensors, where)
        new_folder = not path.parent.exists()
        try:
            make_folder(path.parent)
            if not saved:
                save_checkpoint(path, tensors, ties=comparison.structure.ties)
            entry = with_digest(entry, Checkpoint.open(path))
            self.extend([entry])
            self._comparison = comparison
        except BaseException:
            with contextlib.suppress(OSError):
                if not saved:
                    path.unlink(missing_ok=True)
                if new_folder:
                    path.parent.rmdir()
            raise
        return entry

    def extend(self, entries: Sequence[ZooEntry]) -> None:
        """List checkpoints that are in place already, all or none; their structure and values are not checked.

        Raises InputError if a file is missing or out of bounds, is listed already, or the disk refuses.
        """
        if not entries:
            return
        listed = {entry.file for entry in self.entries}
        for entry in entries:
            self._require_entry(entry)
            if entry.file in listed:
                raise InputError(f"{self.path / entry.file} is a file that the zoo lists already; add a new one")
            listed.add(entry.file)
        manifest = self.path / "manifest.jsonl"
        old_size, was_empty = self._manifest_size, not self.entries
        self._manifest_size = append_lines(manifest, entries, old_size)
        self.entries.extend(entries)
        if was_empty:
            given = self._structure
            try:
                self._write_description()
            except BaseException:
                self.entries.clear()
                self._structure = given
                os.truncate(manifest, old_size)
                self._manifest_size = old_size
                raise

    def rename_runs(self, runs: Sequence[str]) -> None:
        """Set what the runs are called. Raises InputError if the disk refuses."""
        self.runs = list(runs)
        self._write_description()

    def verify(self) -> None:
        """Read every checkpoint; check structure, values and digest. Raises InputError that names file and tensor."""
        self.file(0)
        comparison = Comparison(self.structure)
        for index, entry in enumerate(self.entries):
            self._open_checkpoint(index)
            checkpoint = Checkpoint.open(self.file(index))  # not kept: a whole zoo would stay in memory
            comparison.add_checkpoint(checkpoint, str(checkpoint.path))
            if entry.sha256 and (found := digest_of(checkpoint)) != entry.sha256:
                what = f"{checkpoint.path} has digest {found[:12]}…, but another as collected"
                raise InputError(f"{what}; collect it again")

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the structure and of every file's recorded digest, in the entries' order."""
        digests = [json.dumps(self.structure.to_json()), *(self.digest_of(index) for index in range(len(self)))]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def digest_of(self, index: int) -> str:
        """SHA-256 (hexadecimal) of an entry's file(s), as recorded when it was collected."""
        return self.entries[index].sha256 or digest_of(self._open_checkpoint(index))

    def _open_checkpoint(self, index: int) -> Checkpoint:
        path = self.file(index)
        checkpoint = Checkpoint.open(path)
        for file in checkpoint.sizes:  # a folder or an index may lead elsewhere still
            if not self.entries[index].external and not self.contains(file):
                raise InputError(f"{file} is a link out of the zoo; adopt the checkpoint with `rpg collect --from`")
        size, expected = sum(checkpoint.sizes.values()), self.entries[index].size
        if expected and size != expected:
            raise InputError(f"{path} has {size} bytes, but had {expected} as collected; collect it again")
        ties = self.structure.ties
        self.structure.require(Structure.of_checkpoint(checkpoint), str(path), {*ties, *ties.values()})
        return checkpoint.arranged(ties, self.structure.not_finite)

    def _compared(self) -> Comparison | None:
        """What the zoo's first checkpoint requires of further ones; None for an empty zoo."""
        if self._comparison is None and self.entries:
            self._comparison = Comparison(self.structure)
            self._comparison.add_checkpoint(Checkpoint.open(self.file(0)), str(self.file(0)))
        return self._comparison

    def _require_entry(self, entry: ZooEntry) -> None:
        where = f"{self.path / 'manifest.jsonl'}: file {entry.file!r}"
        file = self.path / entry.file
        if not entry.external and not self.contains(file):
            what = "a symbolic link" if file.is_symlink() else "a path"
            raise InputError(f"{where} is {what} out of the zoo; adopt the checkpoint with `rpg collect --from`")
        if not file.exists():
            raise InputError(f"{where} does not exist; put the checkpoint back, or drop the line")
        require_condition(self.condition, entry.condition, where)

    def _write_description(self) -> None:
        structure = self.structure if self.entries else self._structure
        Description(self.task, self.condition, self.runs, structure).write(self.path / "zoo.json")


def _free_place(folder: Path, number: int, state_dict: StateDict) -> Path:
    """The first ``000000.safetensors`` from ``number`` on that is not there, or holds these very tensors."""
    while (path := folder / f"{number:06d}.safetensors").exists():
        with contextlib.suppress(InputError):
            if same_tensors(Checkpoint.open(path).state_dict(), state_dict):
                break
        number += 1
    return path

"""``zoo.json``: what the checkpoints of a zoo are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenization.checkpoint.safetensors import read_json
from tokenization.checkpoint.structure import Structure
from tokenization.errors import InputError
from tokenization.files import write_text
from tokenization.zoo.condition import ConditionSpec

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

    Raises:
        InputError: there is a zoo, a file, or a folder full of something else.
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

"""``zoo.json``: what the checkpoints of a zoo are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenization.checkpoint.safetensors import read_json
from tokenization.checkpoint.structure import Structure
from tokenization.errors import InputError
from tokenization.files import publish_text
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
            found = f"format {content.get('format')!r}" if isinstance(content, dict) else "no JSON object"
            raise InputError(str(path), found, f"format {FORMAT}", "collect the zoo with this version")
        task, runs = content.get("task"), content.get("runs", [])
        condition, structure = content.get("condition"), content.get("structure")
        if task is not None and not isinstance(task, dict):
            raise InputError(f"{path}: task", repr(task), "a task's name and arguments")
        if not isinstance(runs, list) or not all(isinstance(run, str) for run in runs):
            raise InputError(f"{path}: runs", repr(runs), "a list of names")
        return cls(
            task,
            None if condition is None else ConditionSpec.from_json(condition, str(path)),
            runs,
            None if structure is None else Structure.from_json(structure, str(path)),
        )

    def write(self, path: Path) -> None:
        """Write ``zoo.json`` atomically. Raises InputError if the disk refuses."""
        content = {
            "format": FORMAT,
            "task": self.task,
            "condition": None if self.condition is None else dataclasses.asdict(self.condition),
            "runs": list(self.runs),
            "structure": None if self.structure is None else self.structure.to_json(),
        }
        publish_text(path, json.dumps(content, indent=1) + "\n")

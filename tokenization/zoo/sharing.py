"""Zoos on the Hugging Face hub, as data sets."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError
from tokenization.files import atomic_folder
from tokenization.lora.adapter import CONFIG_NAME
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.description import Description, require_new_folder
from tokenization.zoo.hub import publish, pull, without_local_paths
from tokenization.zoo.manifest import ZooEntry, read_manifest

if TYPE_CHECKING:
    from tokenization.checkpoint.structure import Structure

FETCHED = ("*.json", "*.jsonl", "README.md", "*.safetensors")
REPLACED = ("checkpoints/*", "base.safetensors", CONFIG_NAME)
"""What of a repository a zoo consists of, and what of it an earlier version may have left."""

AnyZoo = TypeVar("AnyZoo", bound="SharedZoo")


class SharedZoo:
    """The part of a `tokenization.zoo.zoo.Zoo` that speaks to the hub."""

    path: Path
    task: dict[str, Any] | None
    condition: ConditionSpec | None
    runs: list[str]
    entries: list[ZooEntry]
    if TYPE_CHECKING:

        @property
        def structure(self) -> Structure:
            """What all checkpoints have in common."""

        @classmethod
        def open(cls: type[AnyZoo], path: Path | str) -> AnyZoo:
            """Open a zoo's folder."""

        def checkpoint(self, index: int) -> Checkpoint:
            """Open an entry's checkpoint."""

    @classmethod
    def from_hub(cls: type[AnyZoo], repo: str, path: Path | str | None = None, **options: Any) -> AnyZoo:
        """Open a zoo that lies on the Hugging Face hub.

        Args:
            repo: id of the data set, ``name/zoo``.
            path: a new folder for it; without one it lies in the hub's cache of assets, and is fetched once a commit.
            options: ``revision``, ``cache_dir``, ``token``, ``local_files_only`` and ``force_download``, as
                `tokenization.zoo.hub.pull` takes them.

        Raises:
            InputError: there is no such zoo, it cannot be fetched, or it names files outside itself.
        """
        from huggingface_hub import cached_assets_path

        snapshot = pull(repo, "dataset", FETCHED, **options)
        if not (snapshot / "zoo.json").is_file():
            raise InputError(f"dataset {repo} is no zoo: it has no zoo.json; make one with `rpg push ZOO {repo}`")
        if any(entry.external for entry in read_manifest(snapshot / "manifest.jsonl")):
            raise InputError(
                f"dataset {repo}: its manifest.jsonl names files outside the zoo; ask its owner to mend it"
            )
        if path is None:
            target = Path(cached_assets_path("rpg", f"zoos--{repo}", snapshot.name))
            if (target / "zoo.json").is_file():
                return cls.open(target)
        else:
            target = Path(path)
            require_new_folder(target)
        with atomic_folder(target) as temporary:
            for file in (each for each in snapshot.rglob("*") if each.is_file()):
                _place(file.resolve(), temporary / file.relative_to(snapshot))
        return cls.open(target)

    def push_to_hub(self, repo: str, **options: Any) -> str:
        """Publish the zoo as a data set, adopted checkpoints with it; paths of this machine stay out.

        Args:
            repo: ``name/zoo``; made if it is not there.
            options: ``private``, ``branch``, ``token`` and ``message``, as `tokenization.zoo.hub.publish` takes them.

        Returns:
            The address of the commit.

        Raises:
            InputError: the zoo is empty or damaged, or the hub refuses or cannot be reached.
        """
        structure = self.structure
        files: dict[str, Path | bytes] = {}
        lines = [self._publish_entry(index, files) for index in range(len(self.entries))]
        runs = without_local_paths(self.runs)
        runs = runs if len(set(runs)) == len(runs) else [f"run {index}" for index in range(len(runs))]
        description = Description(without_local_paths(self.task), self.condition, runs, structure)
        for name in ("base.safetensors", CONFIG_NAME):
            if (self.path / name).is_file():
                files[name] = _content(self.path / name)
        files["zoo.json"] = description.to_text().encode()
        files["manifest.jsonl"] = "".join(lines).encode()
        files["README.md"] = self._card(repo).encode()
        return publish(files, repo, "dataset", REPLACED, **options)

    def _publish_entry(self, index: int, files: dict[str, Path | bytes]) -> str:
        """Add the files of an entry, and give its line in the published manifest."""
        entry, checkpoint = self.entries[index], self.checkpoint(index)
        path, parts = self.path / entry.file, set(checkpoint.sizes)
        if path.is_dir():
            parts |= {*path.glob("*.index.json"), *path.glob(CONFIG_NAME)}
        else:
            parts.add(path)  # of a sharded one the index
        names = {part: Path(os.path.relpath(part, self.path)) for part in (path, *parts)}
        if entry.external:
            adopted = Path("checkpoints") / f"adopted-{index:06}"
            names = {part: adopted / part.name for part in names}
            if path.is_dir():
                names[path] = adopted
            elif len(parts) == 1:
                names[path] = adopted.with_suffix(path.suffix)
        files |= {names[part].as_posix(): _content(part) for part in parts}
        return dataclasses.replace(entry, file=names[path].as_posix(), source="", external=False).to_line()

    def _card(self, repo: str) -> str:
        from huggingface_hub import DatasetCardData

        values = sum(math.prod(shape) for _, shape in self.structure.tensors.values())
        condition = f"{self.condition.kind}, {self.condition.size}" if self.condition else "none"
        splits = Counter(entry.split for entry in self.entries)
        rows = {
            "checkpoints": len(self.entries),
            "training runs": len({entry.run for entry in self.entries}),
            "values of a checkpoint": f"{values:,} in {len(self.structure.tensors)} tensors",
            "condition": condition,
            "splits": ", ".join(f"{name} {count}" for name, count in splits.items()),
        }
        for name in {key: None for entry in self.entries for key in entry.metrics}:
            found = [entry.metrics[name] for entry in self.entries if name in entry.metrics]
            rows[f"mean {name}"] = f"{sum(found) / len(found):.4g}"
        table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
        data = DatasetCardData(pretty_name=repo.partition("/")[2], tags=["rpg", "model-zoo", "neural-network-weights"])
        return f"""---
{data.to_yaml()}
---
# A zoo of trained networks

Checkpoints of one structure, for learning to generate such weights.

| | |
| --- | --- |
{table}

```python
from rpg import Zoo

zoo = Zoo.from_hub("{repo}")
state_dict = zoo.state_dict(0)
```

Every checkpoint is a safetensors file that any loader takes; `manifest.jsonl` has its run, step, condition and scores.
"""


def _content(path: Path) -> Path | bytes:
    """A file to publish: as it is, or if it is PEFT's configuration, without the paths of this machine."""
    if path.name != CONFIG_NAME:
        return path
    return (json.dumps(without_local_paths(json.loads(path.read_text(encoding="utf-8"))), indent=2) + "\n").encode()


def _place(source: Path, target: Path) -> None:
    """Put a file of the hub's cache into a zoo: weights, which nobody changes, as a link where the disk can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".safetensors":
        try:
            os.link(source, target)
            return
        except OSError:  # another disk, or one without links
            pass
    shutil.copyfile(source, target)

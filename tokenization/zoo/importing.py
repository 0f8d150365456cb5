"""A user's own checkpoints become a zoo: safetensors where they lie, pickles converted once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint, read_state_dict
from tokenization.checkpoint.pickles import pickled_files
from tokenization.checkpoint.safetensors import natural_key
from tokenization.checkpoint.structure import Structure
from tokenization.errors import InputError
from tokenization.lora.adapter import is_adapter, read_adapter_config
from tokenization.lora.collected import CollectedAdapters
from tokenization.zoo.comparison import Comparison
from tokenization.zoo.condition import ConditionKind, ConditionSpec
from tokenization.zoo.description import require_new_folder
from tokenization.zoo.locks import locks
from tokenization.zoo.manifest import ZooEntry, entry_of, with_digest
from tokenization.zoo.metadata_table import Label, infer_condition, label_of, read_name, read_table, resolve_condition
from tokenization.zoo.names import recognise
from tokenization.zoo.sources import find_checkpoints, folder_of
from tokenization.zoo.zoo import Zoo


@dataclass(frozen=True)
class _Source:
    """One checkpoint found: its path, its label, and its entry if it is adopted (None: to be converted).

    Of adapters with another scaling than the zoo's, ``factors`` has what tensors are multiplied by.
    """

    path: Path
    label: Label
    entry: ZooEntry | None = None
    factors: Mapping[str, float] = field(default_factory=dict)

    def state_dict(self, structure: Structure | None) -> dict[str, Tensor]:
        """What the zoo is to store, in its order, so that pickles and safetensors mix."""
        found = read_state_dict(self.path)
        for name, factor in self.factors.items():
            found[name] = (found[name].double() * factor).to(found[name].dtype)
        if structure is None:
            return found
        names = [name for name in [*structure.tensors, *structure.ties] if name in found]
        return {name: found[name] for name in names} | found


@locks(lambda source, zoo_path, **_: zoo_path)
def collect_from(
    source: Path | str | Sequence[Path | str],
    zoo_path: Path | str,
    *,
    table: Path | str | None = None,
    pattern: str | None = None,
    condition: ConditionSpec | ConditionKind | None = None,
    task: dict[str, Any] | None = None,
    base: str | None = None,
    find_runs: bool = True,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Zoo:
    """Make a zoo of checkpoints that exist, or add those that are not yet in it.

    Everything is read and checked before anything is written. Safetensors stay where they are; pickles are converted.
    A killed collection resumes with the first that is missing.

    Args:
        source: a folder (searched at any depth), a glob, or several of them.
        zoo_path: the zoo; made if it is not there. It may be the source folder itself.
        table: CSV or JSONL with ``file`` (relative to the table or the source's folder), ``run``, ``step``, ``split``,
            ``condition`` (or ``condition.NAME``); other columns are metrics. Its rows choose the checkpoints.
        pattern: regular expression on each path; named groups mean the same as the columns, which go first.
        find_runs: without a pattern, take what a table leaves open from common names (`tokenization.zoo.names`); no run
            from anywhere: every checkpoint is one.
        condition: what the conditions mean, or their kind; inferred if left out.
        task, base: of a new zoo its task; of adapters the base of all of them, whatever path each names.
        progress: called with (checked, total) checkpoints; say: receives lines of what names told and was converted.

    Raises:
        InputError: no checkpoints, a broken one, one of another structure, with NaN, or a bad label.
    """
    zoo_path = Path(zoo_path)
    exists = (zoo_path / "zoo.json").exists()
    zoo = Zoo.open(zoo_path, repair=True) if exists else Zoo(zoo_path)
    wanted = zoo.condition or condition
    kind = wanted.kind if isinstance(wanted, ConditionSpec) else wanted
    labelled = _labelled(source, zoo_path, table, pattern, kind, say if find_runs and pattern is None else None)
    labels = [label for _, label in labelled]
    if not exists:
        require_new_folder(zoo_path, [path for path, _ in labelled])
        spec = condition if isinstance(condition, ConditionSpec) else infer_condition(labels, condition)
        zoo = Zoo(zoo_path, task=task, condition=spec)
    known = {entry.source or str((zoo.path / entry.file).resolve()) for entry in zoo.entries}
    labelled = [each for each in labelled if str(each[0].resolve()) not in known]
    runs = zoo.runs + [str(run) for run in range(len(zoo.runs), zoo.num_runs)]  # a task's runs have no names
    runs += sorted({_run_name(path, label) for path, label in labelled} - set(runs), key=natural_key)
    adapters = CollectedAdapters(zoo.path if zoo.entries else None, base)
    sources, structure = _checked(labelled, zoo, runs, adapters, progress, say)
    if not sources:
        return zoo
    if not exists:
        what: Any = {"task": zoo.task, "condition": zoo.condition, "runs": runs, "structure": structure}
        zoo = Zoo.create(zoo_path, among=[path for path, _ in labelled], **what)
    elif runs != zoo.runs:
        zoo.rename_runs(runs)
    adapters.finish(zoo.path, say)
    _write(zoo, sources, runs)
    return zoo


def _labelled(
    source: Path | str | Sequence[Path | str],
    zoo_path: Path,
    table: Path | str | None,
    pattern: str | None,
    kind: ConditionKind | None,
    say: Callable[[str], None] | None,
) -> list[tuple[Path, Label]]:
    """Every checkpoint with what is known of it; where ``say`` is given, names are asked what the table leaves open."""
    sources = [source] if isinstance(source, str | Path) else list(source)
    rows: list[tuple[Path, str, dict[str, Any]]] = []
    if table is None:
        for item in sources:
            rows += [(path, str(path), {}) for path in find_checkpoints(item, zoo_path)]
    else:
        folders = [Path(table).parent, *(folder_of(item) for item in sources)]
        for where, row in read_table(Path(table)):
            path = next((folder / row["file"] for folder in folders if (folder / row["file"]).exists()), None)
            if path is None:
                what = f"{where}: file {row['file']!r} does not exist"
                raise InputError(f"{what}; name a checkpoint beside the table or in the source")
            rows.append((path, where, row))
    kept: list[tuple[Path, str, dict[str, Any]]] = []
    seen: dict[Path, str] = {}
    for path, where, row in rows:
        if path.resolve() in seen:
            if table is None:
                continue
            what = f"{where}: file {row['file']!r} is already in {seen[path.resolve()]}"
            raise InputError(f"{what}; drop one of the lines")
        seen[path.resolve()] = where
        named = read_name(pattern, path.as_posix()) if pattern is not None else {}
        kept.append((path, where, {**named, **row}))
    if say is not None and not all("run" in row and "step" in row for *_, row in kept):
        told = recognise([path for path, *_ in kept])
        say(told.notice) if told.notice else None
        kept = [
            (path, where, {**more, **row}) for (path, where, row), more in zip(kept, told.rows, strict=False)
        ] or kept
    return [(path, label_of(row, where, kind)) for path, where, row in kept]


def _checked(
    labelled: list[tuple[Path, Label]],
    zoo: Zoo,
    runs: list[str],
    adapters: CollectedAdapters,
    progress: Callable[[int, int], None] | None,
    say: Callable[[str], None],
) -> tuple[list[_Source], Structure | None]:
    """Read every checkpoint and compare them.

    Returns:
        The sources with the entries of those to be adopted, and what all have in common (None of no checkpoints).
    """
    comparison = Comparison(zoo.structure if zoo.entries else None)
    if zoo.entries and labelled:
        comparison.add_checkpoint(Checkpoint.open(zoo.file(0)), str(zoo.file(0)))
    expected = zoo.structure if zoo.entries else None
    sources = []
    for index, (path, label) in enumerate(labelled):
        where = str(path)
        fields = _fields(path, label, zoo, runs)
        config = read_adapter_config(path) if is_adapter(path) else None
        checkpoint = None if pickled_files(path) else Checkpoint.open(path)
        state_dict = read_state_dict(path) if checkpoint is None else {}
        structure = Structure.of_state_dict(state_dict) if checkpoint is None else Structure.of_checkpoint(checkpoint)
        factors = adapters.factors(
            path,
            config,
            {name: shape for name, (_, shape) in structure.tensors.items()},
            state_dict.__getitem__ if checkpoint is None else checkpoint.tensor,
        )
        entry = None
        if checkpoint is None or factors:
            state_dict = _Source(path, label, None, factors).state_dict(expected)
            structure = Structure.of_state_dict(state_dict)
            comparison.add_state_dict(state_dict, where)
        else:
            entry = _adopted(checkpoint, zoo, fields)
            comparison.add_checkpoint(checkpoint, where)
            entry = with_digest(entry, checkpoint)
        expected = expected or structure
        sources.append(_Source(path, label, entry, factors))
        if progress is not None:
            progress(index + 1, len(labelled))
    for notice in comparison.notices:
        say(notice)
    return sources, comparison.structure if sources else None


def _write(zoo: Zoo, sources: list[_Source], runs: list[str]) -> None:
    adopted: list[ZooEntry] = []
    for item in sources:
        if item.entry is not None:
            adopted.append(item.entry)
            continue
        zoo.extend(adopted)
        adopted = []
        state_dict = item.state_dict(zoo.structure if zoo.entries else None)
        zoo.append(state_dict, source=str(item.path.resolve()), **_fields(item.path, item.label, zoo, runs))
    zoo.extend(adopted)


def _fields(path: Path, label: Label, zoo: Zoo, runs: list[str]) -> dict[str, Any]:
    return {
        "run": runs.index(_run_name(path, label)),
        "step": label.step,
        "condition": resolve_condition(label, zoo.condition),
        "metrics": label.metrics,
        "split": label.split,
    }


def _run_name(path: Path, label: Label) -> str:
    # Weights of unknown origin may be permuted against each other: none share a run unless the user says so.
    return label.run if label.run is not None else path.as_posix()


def _adopted(checkpoint: Checkpoint, zoo: Zoo, fields: dict[str, Any]) -> ZooEntry:
    # Not resolved: the hub's cache links readable names to blobs that have none.
    absolute, folder = Path(os.path.abspath(checkpoint.path)), Path(os.path.abspath(zoo.path))
    inside = absolute.is_relative_to(folder) and all(zoo.contains(file) for file in checkpoint.sizes)
    file = absolute.relative_to(folder).as_posix() if inside else str(absolute)
    return entry_of({**fields, "file": file, "external": not inside}, str(checkpoint.path))

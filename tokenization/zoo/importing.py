"""A user's own checkpoints become a zoo: safetensors where they lie, pickles converted once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.safetensors import natural_key
from tokenization.checkpoint.structure import Structure
from tokenization.checkpoint.weights import AS_FOUND, Chosen
from tokenization.errors import InputError
from tokenization.lora.collected import CollectedAdapters
from tokenization.zoo.condition import ConditionKind, ConditionSpec
from tokenization.zoo.description import require_new_folder
from tokenization.zoo.locks import locks
from tokenization.zoo.manifest import ZooEntry, entry_of, with_digest
from tokenization.zoo.metadata_table import Label, infer_condition, label_of, read_name, read_table, resolve_condition
from tokenization.zoo.names import recognise
from tokenization.zoo.reading import Reading, Row, Source, find_checkpoints, folder_of
from tokenization.zoo.zoo import Zoo


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
    chosen: Chosen = AS_FOUND,
    skip_bad: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Zoo:
    """Make a zoo of checkpoints that exist, or add those that are not yet in it.

    Everything is read and checked before anything is written. Safetensors with plain names stay where they are, all
    else is converted. A killed collection resumes with the first that is missing.

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
        chosen: which of several sets of weights in a file, and the prefix to cut off names.
        skip_bad: go on past checkpoints that cannot be read or do not belong.
        progress: called with (checked, total) checkpoints; say: receives a line on all that was told or left out.

    Raises:
        InputError: no checkpoints, a broken one, one of another structure, with NaN, or a bad label.
    """
    zoo_path = Path(zoo_path)
    exists = (zoo_path / "zoo.json").exists()
    zoo = Zoo.open(zoo_path, repair=True) if exists else Zoo(zoo_path)
    kind = wanted.kind if isinstance(wanted := zoo.condition or condition, ConditionSpec) else wanted
    rows = _rows(source, zoo_path, table, pattern, say)
    if not exists:
        require_new_folder(zoo_path, [row.path for row in rows])
    fresh = _not_in(zoo, rows)
    adapters = CollectedAdapters(zoo.path if zoo.entries else None, base)
    sources = (reading := Reading(zoo, adapters, chosen, skip_bad, say)).read(fresh, progress)
    rows = [row for row in rows if row not in fresh or any(row is each.row for each in sources)]
    labels = _labels(rows, kind, say if find_runs and pattern is None else None)
    if not exists:
        spec = condition if isinstance(condition, ConditionSpec) else infer_condition(list(labels.values()), condition)
        zoo = Zoo(zoo_path, task=task, condition=spec)
    named = table is not None or pattern is not None
    runs, entries = _entries(zoo, reading.without_twins([(each, labels[each.row.path]) for each in sources], named))
    if not entries:
        return zoo
    zoo = _opened(zoo, exists, runs, sources, reading.comparison.structure)
    adapters.finish(zoo.path, say)
    _write(zoo, entries, chosen)
    return zoo


def _not_in(zoo: Zoo, rows: Sequence[Row]) -> list[Row]:
    known = {Path(entry.source or zoo.path / entry.file).resolve() for entry in zoo.entries}
    return [row for row in rows if row.path.resolve() not in known]


def _entries(zoo: Zoo, kept: Sequence[tuple[Source, Label]]) -> tuple[list[str], list[tuple[Source, dict[str, Any]]]]:
    """The names of all runs, and the sources with the fields of their lines in the manifest."""
    runs = zoo.runs + [str(run) for run in range(len(zoo.runs), zoo.num_runs)]  # a task's runs have no names
    runs += sorted({_run_name(each.row.path, label) for each, label in kept} - set(runs), key=natural_key)
    return runs, [(each, _fields(each.row.path, label, zoo, runs)) for each, label in kept]


def _opened(zoo: Zoo, exists: bool, runs: list[str], sources: Sequence[Source], structure: Structure) -> Zoo:
    """The zoo on disk, made if need be, with the runs' names."""
    if not exists:
        what: Any = {"task": zoo.task, "condition": zoo.condition, "runs": runs, "structure": structure}
        return Zoo.create(zoo.path, among=[each.row.path for each in sources], **what)
    if runs != zoo.runs:
        zoo.rename_runs(runs)
    return zoo


def _rows(
    source: Path | str | Sequence[Path | str],
    zoo_path: Path,
    table: Path | str | None,
    pattern: str | None,
    say: Callable[[str], None],
) -> list[Row]:
    """Every checkpoint that the sources stand for or the table names, with what table and pattern say of it."""
    sources = [source] if isinstance(source, str | Path) else list(source)
    rows: list[Row] = []
    if table is None:
        ignored: list[str] = []
        for item in sources:
            rows += [Row(path, str(path), {}) for path in find_checkpoints(item, zoo_path, ignored)]
        if ignored:
            more = f" (and {len(ignored) - 1} more such)" if len(ignored) > 1 else ""
            say(f"left out: {ignored[0]}{more}")
    else:
        folders = [Path(table).parent, *(folder_of(item) for item in sources)]
        for where, told in read_table(Path(table)):
            path = next((folder / told["file"] for folder in folders if (folder / told["file"]).exists()), None)
            if path is None:
                what = f"{where}: file {told['file']!r} does not exist"
                raise InputError(f"{what}; name a checkpoint beside the table or in the source")
            rows.append(Row(path, where, told))
    kept: list[Row] = []
    seen: dict[Path, str] = {}
    for row in rows:
        if row.path.resolve() in seen:
            if table is None:
                continue
            what = f"{row.where}: file {row.known['file']!r} is already in {seen[row.path.resolve()]}"
            raise InputError(f"{what}; drop one of the lines")
        seen[row.path.resolve()] = row.where
        named = read_name(pattern, row.path.as_posix()) if pattern is not None else {}
        kept.append(Row(row.path, row.where, {**named, **row.known}))
    return kept


def _labels(rows: list[Row], kind: ConditionKind | None, say: Callable[[str], None] | None) -> dict[Path, Label]:
    """What is known of every checkpoint; where ``say`` is given, names are asked what the table leaves open."""
    told: Sequence[Mapping[str, Any]] = ()
    if say is not None and not all("run" in row.known and "step" in row.known for row in rows):
        recognised = recognise([row.path for row in rows])
        say(recognised.notice) if recognised.notice else None
        told = recognised.rows
    more = told or [{}] * len(rows)
    return {row.path: label_of({**named, **row.known}, row.where, kind) for row, named in zip(rows, more, strict=True)}


def _write(zoo: Zoo, entries: Sequence[tuple[Source, dict[str, Any]]], chosen: Chosen) -> None:
    adopted: list[ZooEntry] = []
    for source, fields in entries:
        path = source.row.path
        if source.adopted is not None:
            adopted.append(with_digest(_adopted(source.adopted, zoo, fields), source.adopted))
            continue
        zoo.extend(adopted)
        adopted = []
        state_dict = source.state_dict(chosen, zoo.structure if zoo.entries else None)
        zoo.append(state_dict, source=str(path.resolve()), **fields)
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

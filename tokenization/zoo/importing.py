"""A user's own checkpoints become a zoo: safetensors where they lie, pickles converted once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenization.checkpoint.checkpoint import (
    Checkpoint,
    read_state_dict,
)
from tokenization.checkpoint.safetensors import natural_key
from tokenization.checkpoint.weights import AS_FOUND, Chosen
from tokenization.errors import InputError
from tokenization.files import write_text
from tokenization.lora.adapter import (
    CONFIG_NAME,
)
from tokenization.zoo.condition import ConditionKind, ConditionSpec
from tokenization.zoo.description import require_new_folder
from tokenization.zoo.locks import locks
from tokenization.zoo.manifest import ZooEntry, entry_of, with_digest
from tokenization.zoo.metadata_table import Label, infer_condition, label_of, read_name, read_table, resolve_condition
from tokenization.zoo.names import recognise
from tokenization.zoo.reading import Reading, Row, Source, in_order
from tokenization.zoo.sources import find_checkpoints
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
    find_runs: bool = True,
    chosen: Chosen = AS_FOUND,
    skip_bad: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Zoo:
    """Make a zoo of checkpoints that exist, or add those that are not yet in it.

    Everything is read and checked before anything is written. Safetensors with plain names stay where they are; pickles
    and names with wrappers' prefixes are converted. A killed collection resumes with the first that is missing.

    Args:
        source: a folder (searched at any depth), a glob, or several of them.
        zoo_path: the zoo; made if it is not there. It may be the source folder itself.
        table: CSV or JSONL with ``file`` (relative to the table or the source folder), ``run``, ``step``, ``split``,
            ``condition`` (or ``condition.NAME``); other columns are metrics. Its rows choose the checkpoints.
        pattern: regular expression on each path; named groups mean the same as the columns, which go first.
        find_runs: without a pattern, take what a table leaves open from common names (`tokenization.zoo.names`); no run
            from anywhere: every checkpoint is one.
        condition: what the conditions mean, or their kind; inferred if left out.
        task: the zoo's task, for a new zoo.
        chosen: which of several sets of weights in a file, and the prefix to cut off names.
        skip_bad: go on past checkpoints that cannot be read or do not belong.
        progress: called with (checked, total) checkpoints; say: receives one line of what names told, and one on
            everything that was renamed or left out.

    Raises:
        InputError: no checkpoints, a broken one, one of another structure, with NaN, or a bad label.
    """
    zoo_path = Path(zoo_path)
    exists = (zoo_path / "zoo.json").exists()
    zoo = Zoo.open(zoo_path, repair=True) if exists else Zoo(zoo_path)
    wanted = zoo.condition or condition
    kind = wanted.kind if isinstance(wanted, ConditionSpec) else wanted
    rows = _rows(source, zoo_path, table, pattern, say)
    if not exists:
        require_new_folder(zoo_path, [row.path for row in rows])
    known = {entry.source or str((zoo.path / entry.file).resolve()) for entry in zoo.entries}
    fresh = [row for row in rows if str(row.path.resolve()) not in known]
    reading = Reading(zoo, chosen, skip_bad, say)
    sources = reading.read(fresh, progress)
    rows = [row for row in rows if row not in fresh or any(row is each.row for each in sources)]
    labels = _labels(rows, kind, say if find_runs and pattern is None else None)
    if not exists:
        spec = condition if isinstance(condition, ConditionSpec) else infer_condition(list(labels.values()), condition)
        zoo = Zoo(zoo_path, task=task, condition=spec)
    named = table is not None or pattern is not None
    kept = reading.without_twins([(each, labels[each.row.path]) for each in sources], keep=named)
    runs = zoo.runs + [str(run) for run in range(len(zoo.runs), zoo.num_runs)]  # a task's runs have no names
    runs += sorted({_run_name(each.row.path, label) for each, label in kept} - set(runs), key=natural_key)
    entries = [(each, _fields(each.row.path, label, zoo, runs)) for each, label in kept]
    if not entries:
        return zoo
    zoo = _opened(zoo, exists, runs, [each.row.path for each in sources], reading.adapter)
    _write(zoo, entries, chosen)
    return zoo


def _opened(zoo: Zoo, exists: bool, runs: Sequence[str], among: Sequence[Path], adapter: Path | None) -> Zoo:
    """The zoo on disk, made if need be, with the runs' names and the configuration of an ``adapter``."""
    if not exists:
        zoo = Zoo.create(zoo.path, task=zoo.task, condition=zoo.condition, runs=runs, among=among)
    elif list(runs) != zoo.runs:
        zoo.rename_runs(runs)
    if adapter is not None and not (zoo.path / CONFIG_NAME).exists():
        write_text(zoo.path / CONFIG_NAME, (adapter / CONFIG_NAME).read_text(encoding="utf-8"))
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
        folders = [Path(table).parent, *(Path(item) for item in sources)]
        for where, row in read_table(Path(table)):
            path = next((folder / row["file"] for folder in folders if (folder / row["file"]).exists()), None)
            if path is None:
                what = f"{where}: file {row['file']!r} does not exist"
                raise InputError(f"{what}; name a checkpoint beside the table or in the source")
            rows.append(Row(path, where, row))
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
        state_dict = in_order(read_state_dict(path, chosen), zoo.structure if zoo.entries else None)
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

"""What is known of a user's own checkpoints: run, step, split, condition and scores, from a table or from names."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenization.checkpoint.safetensors import natural_key
from tokenization.errors import InputError
from tokenization.files import json_lines
from tokenization.zoo.condition import ConditionKind, ConditionSpec, require_condition

_CONDITION_PREFIX = "condition."
_METRIC_PREFIX = "metrics."


@dataclass(frozen=True)
class Label:
    """What is known of one checkpoint. ``condition`` is a tuple of numbers, or a class or text by name."""

    where: str
    run: str | None = None
    step: int = 0
    split: str = "train"
    condition: tuple[float, ...] | str | None = None
    condition_names: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)


def read_table(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Rows of a CSV (with commas, semicolons or tabs) or JSONL file with a column ``file``: ``[(where, row)]``.

    Raises InputError that names the line if the table is unreadable, empty or without that column.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path} is an unreadable table ({reason}); give a CSV or JSONL file") from error
    rows: list[tuple[str, dict[str, Any]]] = []
    if path.suffix in (".csv", ".tsv"):
        head = text.partition("\n")[0]
        delimiter = max(",;\t", key=head.count)  # spreadsheets write ; where the comma is decimal
        reader = csv.DictReader(text.splitlines(), strict=True, skipinitialspace=True, delimiter=delimiter)
        try:
            for row in reader:
                where = f"{path}: line {reader.line_num}"
                if None in row or None in row.values():
                    count = len(reader.fieldnames or ())
                    raise InputError(f"{where} has another number of fields than the {count} of line 1; fix the line")
                if delimiter == ";":
                    row = {key: _decimal(key, value) for key, value in row.items()}
                rows.append((where, {key: value for key, value in row.items() if value != ""}))
        except csv.Error as error:
            raise InputError(f"{path}: line {reader.line_num} is not CSV ({error}); fix the line") from error
    elif path.suffix in (".jsonl", ".json"):
        lines = json_lines(text, path)
        rows += [(where, {key: each for key, each in row.items() if each is not None}) for where, row in lines]
    else:
        raise InputError(f"{path} has the suffix {path.suffix!r}; give a table in .csv, .tsv or .jsonl")
    if not rows:
        raise InputError(f"{path} has no rows; write one per checkpoint")
    for where, row in rows:
        if not isinstance(row.get("file"), str) or "\0" in row["file"]:
            raise InputError(f"{where} has no file; add a column 'file' that names the checkpoint")
    return rows


def read_name(pattern: str, name: str) -> dict[str, Any]:
    """What the named groups of a regular expression find in a file's name. Raises InputError if it finds nothing."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"pattern: {pattern!r} is not a regular expression ({error}); fix it") from error
    if not compiled.groupindex:
        raise InputError(f"pattern: {pattern!r} has no named groups; name them, such as (?P<run>[0-9]+)")
    match = compiled.search(name)
    if match is None:
        raise InputError(f"{name} does not match the pattern {pattern!r}; fix the pattern")
    return {key: text for key, text in match.groupdict().items() if text is not None}


def label_of(row: Mapping[str, Any], where: str, kind: ConditionKind | None = None) -> Label:
    """Read the columns ``run, step, split, condition, condition.NAME, metrics``; every other one is a metric.

    Conditions of the kind ``text`` are taken as they are, "3 cats" too.
    Raises InputError that names a column whose value is of the wrong kind.
    """
    metrics: dict[str, float] = {}
    components: dict[str, float] = {}
    for key, value in row.items():
        if key == "metrics" and isinstance(value, dict):
            metrics |= {name: _number(item, f"{where}: metrics.{name}") for name, item in value.items()}
        elif key.startswith(_CONDITION_PREFIX):
            components[key.removeprefix(_CONDITION_PREFIX)] = _number(value, f"{where}: {key}")
        elif key not in ("file", "run", "step", "split", "condition"):
            metrics[key.removeprefix(_METRIC_PREFIX)] = _number(value, f"{where}: {key}")
    condition: tuple[float, ...] | str | None = None
    if "condition" in row:
        condition = str(row["condition"]) if kind == "text" else _condition(row["condition"], f"{where}: condition")
    if components and condition is not None:
        raise InputError(f"{where}: condition is there twice; write it alone, or {_CONDITION_PREFIX}NAME columns")
    step = _number(row.get("step", 0), f"{where}: step")
    if step != int(step) or step < 0:
        raise InputError(f"{where}: step is {row['step']!r}; write a whole number from 0 on")
    return Label(
        where,
        run=str(row["run"]) if "run" in row else None,
        step=int(step),
        split=str(row.get("split", "train")),
        condition=tuple(components.values()) if components else condition,
        condition_names=tuple(components),
        metrics=metrics,
    )


def infer_condition(labels: Sequence[Label], kind: ConditionKind | None = None) -> ConditionSpec | None:
    """What the conditions of all checkpoints amount to.

    Names become classes (``kind="text"``: texts), single whole numbers class indices. Several numbers are a binary
    vector if all are 0 or 1, else a real vector.
    Raises InputError if some have a condition and others none, or they are of different kinds or lengths.
    """
    given = [label for label in labels if label.condition is not None]
    if not given:
        if kind is not None and labels:
            raise InputError(f"{labels[0].where}: condition is missing; add the column, of the kind {kind}")
        return None
    first = given[0]
    for label in labels:
        if label.condition is None:
            raise InputError(f"{label.where}: condition is missing, but others have one; give all or none")
        if isinstance(label.condition, str) != isinstance(first.condition, str):
            what = f"{label.where}: condition is {label.condition!r}, but {first.condition!r} in {first.where}"
            raise InputError(f"{what}; write names or numbers everywhere")
        if not isinstance(label.condition, str) and len(label.condition) != len(first.condition or ()):
            what = f"{label.where}: condition has {len(label.condition)} numbers"
            raise InputError(f"{what}, but {len(first.condition or ())} in {first.where}; write equally many")
        if label.condition_names != first.condition_names:
            raise InputError(f"{label.where}: condition has other columns than {first.where}; use the same")
    if isinstance(first.condition, str):
        if kind not in (None, "class", "text"):
            raise InputError(f"{first.where}: condition is {first.condition!r}; write numbers, as it is a {kind}")
        names = sorted({str(label.condition) for label in given}, key=natural_key)
        return ConditionSpec(kind or "class", len(names), tuple(names))
    values = [value for label in given for value in label.condition or () if not isinstance(value, str)]
    length = len(first.condition or ())
    if kind is None and length == 1 and not first.condition_names and all(v >= 0 and v == int(v) for v in values):
        kind = "class"
    elif kind is None:
        kind = "binary" if set(values) <= {0.0, 1.0} else "vector"
    if kind in ("binary", "vector"):
        return ConditionSpec(kind, length, first.condition_names)
    return ConditionSpec(kind, int(max(values)) + 1)


def resolve_condition(label: Label, spec: ConditionSpec | None) -> tuple[float, ...] | None:
    """A label's condition as the numbers of a zoo entry. Raises InputError if it does not fit the specification."""
    condition = label.condition
    if isinstance(condition, str):
        if spec is None or spec.kind not in ("class", "text") or condition not in spec.names:
            cure = "leave it out" if spec is None else f"write one of {', '.join(spec.names) or 'its numbers'}"
            raise InputError(f"{label.where}: condition is {condition!r}, which the zoo does not know; {cure}")
        condition = (float(spec.names.index(condition)),)
    require_condition(spec, condition, label.where)
    return condition


def _condition(value: Any, where: str) -> tuple[float, ...] | str:
    """Numbers from a list, or from a text such as ``1 0 1`` or ``[1, 0, 1]``; any other text is a name."""
    if isinstance(value, list):
        return tuple(_number(item, where) for item in value)
    if not isinstance(value, str):
        return (_number(value, where),)
    parts = re.split(r"[\s,;]+", value.strip().strip("[]()").strip())
    try:
        float(parts[0])
    except ValueError:
        return value
    return tuple(_number(part, where) for part in parts)


def _decimal(column: str, value: str) -> str:
    """A number with the decimal comma of spreadsheets as one with a point."""
    is_text = column in ("file", "run", "split", "condition")
    return value if is_text else re.sub(r"^(-?\d+),(\d+)$", r"\1.\2", value)


def _number(value: Any, where: str) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} is {value!r}; write a finite number") from error
    return number

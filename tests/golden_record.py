"""Records of what users see, in ``tests/golden/*.json``: a change of structure changes none.

``RECORD_GOLDEN=1 pytest tests/…`` writes the records of those tests anew, where a change is wanted.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpg.evaluation.report import Networks, Report
from tests.machine import machine

FOLDER = Path(__file__).parent / "golden"
NUMBER = re.compile(r"\d[\d,.]*(e[+-]?\d+)?")
SPACES = re.compile(r"\s+")
PLACE = re.compile(r"(/tmp|/dev/shm)/[^\s'\"`;,:)]*/")


def recorded(file: str, name: str, found: Any) -> Any:
    """What the record says of a name; with RECORD_GOLDEN set, ``found`` after it has been recorded."""
    path = FOLDER / f"{file}.json"
    records = json.loads(path.read_text()) if path.exists() else {}
    if os.environ.get("RECORD_GOLDEN"):
        records[name] = json.loads(json.dumps(found))
        path.write_text(json.dumps(dict(sorted(records.items())), indent=1, ensure_ascii=False) + "\n")
    return records[name]


def plain_text(text: str) -> list[str]:
    """Lines of output that say something, without temporary folders and the widths of columns."""
    lines = [SPACES.sub(" ", PLACE.sub("…/", line)).strip("│╭╮╰╯─ ") for line in text.splitlines()]
    return [line for line in lines if line]


def keys_of(value: Any, depth: int = 2) -> Any:
    """The keys of nested dictionaries, sorted; numbers among them and everything else left out."""
    if not isinstance(value, dict) or depth == 0:
        return None
    return {key: keys_of(each, depth - 1) for key, each in sorted(value.items()) if not str(key).isdigit()}


def structure_of(kind: Networks) -> dict[str, Any]:
    """Everything about a kind that no processor changes."""
    return {
        "count": kind.count, "metrics": list(kind.metrics), "distances": list(kind.distances),
        "conditions": [len(kind.conditions), len(kind.conditions[0]) if kind.conditions else 0],
        "novel": len(kind.novel), "components": len(kind.components), "joint": keys_of(kind.joint, 1),
        "extras": keys_of(kind.extras),
    }  # fmt: skip


def check_report(case: str, report: Report) -> None:
    """A report has the recorded structure and, on the machine of the record, the recorded values.

    Elsewhere networks that were hardly trained differ by what a processor's rounding does to them.
    """
    sets = {"": report.kinds, **report.parts}
    structure = {
        "experiment": report.experiment, "judge": report.judge, "split": report.split, "better": report.better,
        "references": list(report.references), "asked": keys_of(report.asked), "facts": keys_of(report.facts, 1),
        "extras": keys_of(report.extras), "notes": [NUMBER.sub("#", note) for note in report.notes],
        "kinds": {part: {name: structure_of(each) for name, each in kinds.items()} for part, kinds in sets.items()},
        "curves": {name: [each.across, each.up, each.log, list(each.lines)] for name, each in report.curves.items()},
    }  # fmt: skip
    values = {
        f"{part}/{name}/{key}": float(np.mean(known))
        for part, kinds in sets.items()
        for name, each in kinds.items()
        for key, found in (*each.metrics.items(), *each.distances.items())
        if (known := [value for value in found if value is not None])
    }
    rounded = {name: float(f"{value:.4g}") for name, value in values.items()}
    record = recorded("reports", case, {"structure": structure, "machine": machine(), "values": rounded})
    assert json.loads(json.dumps(structure)) == record["structure"]
    assert values.keys() == record["values"].keys()
    if record["machine"] == machine():
        assert values == pytest.approx(record["values"], rel=2e-3, abs=2e-4)

"""The scripts' command lines: a mistake is one line and exit code 2."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
MISTAKES = [
    ("resplit", ["one"]),
    ("resplit", ["missing.yaml", "zoo"]),
    ("bench", ["--seconds", "long"]),
    ("bench_adapters", ["--num", "few"]),
    ("gpu_checks", ["unknown"]),
    ("bench_scale", ["--networks", "unknown"]),
    ("bench_tokenization", ["--normalization", "unknown"]),
    ("check_plan", ["--cases", "unknown"]),
    ("archives", ["imagenet", "folder"]),
]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("script", "arguments"), MISTAKES, ids=str)
def test_a_mistake_is_one_line(here, monkeypatch, capsys, script: str, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1

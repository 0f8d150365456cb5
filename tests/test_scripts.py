"""The scripts' command lines: a mistake is one line and exit code 2."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
MISTAKES = [
    ("resplit", ["one"]),
    ("resplit", ["missing.yaml", "zoo"]),
    ("bench", ["--seconds", "long"]),
    ("gpu_checks", ["unknown"]),
    ("bench_scale", ["--networks", "unknown"]),
    ("bench_tokenization", ["--normalization", "unknown"]),
    ("budget", ["--most", "long"]),
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


def test_the_budget_is_of_readmes_commands_and_says_what_grew(here: None) -> None:
    import budget

    known = budget.commands()
    assert known["make unseen"] == ["rpg", "unseen"] and known["make pdiff"][:3] == ["rpg", "sweep", PDIFF]
    assert not any(line.startswith("rpg app") for line in known) and all(words[0] == "rpg" for words in known.values())
    before = {"processor": "a", "processor_seconds": 100.0, "peak_gib": 2.0, "figures": {"run: generated": 0.9}}
    slower = before | {"processor_seconds": 131.0, "figures": {"run: generated": 0.895, "run: original": 0.8}}
    assert budget.changes(before, before | {"processor_seconds": 129.0}) == []
    assert budget.changes(before, slower) == ["processor seconds 100.0 → 131.0"]
    assert budget.changes(before, slower | {"processor": "b"}) == []
    other = before | {"peak_gib": 3.0, "figures": {"run: generated": 0.88}}
    assert budget.changes(before, other) == ["peak gib 2.0 → 3.0", "run: generated 0.9 → 0.88"]


def test_what_fails_or_takes_too_long_is_said_and_the_rest_goes_on(here: None, monkeypatch, capsys) -> None:
    import _common
    import budget

    waiting = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(SystemExit, match=r"was ended after 0\.2 s"):
        _common.timed(waiting, limit=0.2)
    assert _common.timed([sys.executable, "-c", "pass"], limit=60)["processor_seconds"] < 60
    commands = {"rpg nothing": ["rpg", "nothing"], "rpg --version": ["rpg", "--version"]}
    monkeypatch.setattr(budget, "commands", lambda: commands)
    monkeypatch.setattr(budget, "FILE", Path("budget.json"))
    monkeypatch.setattr(sys, "argv", ["budget", "--limit", "300"])
    assert budget.main() == {"exit_code": 1} and list(json.loads(Path("budget.json").read_text())) == ["rpg --version"]
    assert "rpg nothing: " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["budget", "--most", "300", "--keep"])  # what was never timed is not quick
    assert budget.main() == {"exit_code": 0}
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["rpg --version"]


PDIFF = "configs/sweeps/pdiff.yaml"

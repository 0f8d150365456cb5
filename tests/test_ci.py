"""What continuous integration accepts of the demo."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rpg.evaluation.report import Report, networks

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("generated", "passes"), [(0.976, True), (0.953, True), (0.949, False), (0.5, False)])
def test_a_demo_is_accepted_within_two_points_of_the_originals(tmp_path: Path, generated: float, passes: bool) -> None:
    kinds = {
        name: networks({"accuracy": [mean]})
        for name, mean in (("original", 0.972), ("generated", generated), ("run_average", 0.97))
    }
    Report(experiment="networks", judge="t", split="test", seed=0, better={"accuracy": "more"}, kinds=kinds).save(
        tmp_path
    )
    process = subprocess.run([sys.executable, ROOT / "scripts" / "check_demo.py", tmp_path], capture_output=True)
    assert (process.returncode == 0) == passes


def test_pre_commit_runs_the_linters_of_make_lint() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    linters = re.findall(
        r"^\t\$\(BIN\)/(.*)$", (ROOT / "Makefile").read_text().partition("lint:")[2].partition("test:")[0], re.M
    )
    ours = {hook["entry"].removeprefix(".venv/bin/").removesuffix(" --fix") for hook in hooks}
    assert ours == {linter.replace(" --check", "").removesuffix(" .") for linter in linters}


def test_forms_of_issues_and_citation_are_read() -> None:
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"):
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= form.keys()
        assert all({"type", "id", "attributes"} <= field.keys() for field in form["body"])
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_the_check_is_run() -> None:
    assert "scripts/check_demo.py runs/demo" in (ROOT / ".ci" / "run").read_text()

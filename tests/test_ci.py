"""What continuous integration accepts of the demo."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rpg.evaluation.report import Report, networks

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("generated", "passes"), [(0.88, True), (0.821, True), (0.819, False), (0.5, False)])
def test_a_demo_is_accepted_five_points_above_every_rival(tmp_path: Path, generated: float, passes: bool) -> None:
    means = {"original": 0.9, "generated": generated, "kernel_ridge": 0.77, "nearest_seen": 0.74}
    kinds = {name: networks({"accuracy": [mean, mean]}) for name, mean in means.items()}
    Report(experiment="sensors", judge="", split="test", seed=0, better={"accuracy": "more"}, kinds=kinds).save(
        tmp_path
    )
    process = subprocess.run([sys.executable, ROOT / "scripts" / "check_demo.py", tmp_path], capture_output=True)
    assert (process.returncode == 0) == passes


@pytest.mark.parametrize(
    ("generated", "average", "diversity", "passes"),
    [
        (0.976, 0.9, 0.8, True), (0.953, 0.9, 0.8, True), (0.949, 0.9, 0.8, False), (0.97, 0.991, 0.8, False),
        (0.969, 0.969, 0.0, False), (0.969, 0.969, None, False),  # each run's average
    ],
)  # fmt: skip
def test_a_demo_is_accepted_near_the_best_and_unlike_one_another(
    tmp_path: Path, generated: float, average: float, diversity: float | None, passes: bool
) -> None:
    means = {"original": 0.972, "generated": generated, "average": average}
    kinds = {name: {"accuracy": {"mean": mean}} for name, mean in means.items()}
    scores = {"kinds": {name: {"count": 1, "summaries": each} for name, each in kinds.items()}}
    scores["extras"] = {"spread": {"diversity_ratio": diversity}}
    (tmp_path / "evaluation.json").write_text(json.dumps(scores))
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

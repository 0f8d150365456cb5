"""What continuous integration accepts of the demo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("generated", "passes"), [(0.976, True), (0.953, True), (0.949, False), (0.5, False)])
def test_a_demo_is_accepted_within_two_points_of_the_originals(tmp_path: Path, generated: float, passes: bool) -> None:
    scores = {name: {"accuracy": {"mean": mean}} for name, mean in (("original", 0.972), ("generated", generated))}
    (tmp_path / "evaluation.json").write_text(json.dumps(scores))
    process = subprocess.run([sys.executable, ROOT / "scripts" / "check_demo.py", tmp_path], capture_output=True)
    assert (process.returncode == 0) == passes


def test_the_check_is_run() -> None:
    assert "scripts/check_demo.py runs/demo" in (ROOT / ".ci" / "run").read_text()

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rpg.experiments.sweep import load_sweep, run_sweep
from tests.conftest import small_config
from tokenization.errors import InputError


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    task = {"name": "digits", "network": "mlp-mini", "train_steps": 20, "steps": 4, "batch_size": 16}
    small_config(tmp_path, task=task, evaluate={"num": 3, "num_baseline": 2}).save(tmp_path / "base.yaml")
    tree = {
        "config": "base.yaml",
        "run": str(tmp_path / "sweep"),
        "set": ["train.log_every=5"],
        "entries": [
            {"name": "wide", "set": ["tokens.size=64"]},
            {"name": "broken", "set": ["tokens.include=[nothing*]"]},
        ],
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_sweep_runs_once_survives_a_failure_and_reruns_what_changed(tmp_path, sweep):
    said: list[str] = []
    table = run_sweep(sweep, jobs=2, say=said.append)
    assert any(line.startswith("wide: ") and line.endswith(" s), done") for line in said)
    assert any("tokens.include" in line for line in said)
    rows = json.loads((table.parent / "table.json").read_text())
    assert [row["name"] for row in rows] == ["wide", "broken"]
    assert 0 <= rows[0]["mean"] <= rows[0]["best"] <= 1 and rows[0]["training_seconds"] > 0
    assert "fits no tensor" in rows[1]["failure"]
    assert table.read_text().count("\n") == 4

    said.clear()
    tree = yaml.safe_load(sweep.read_text())
    tree["entries"] = tree["entries"][:1]
    sweep.write_text(yaml.safe_dump(tree))
    run_sweep(sweep, say=said.append)
    assert said == []  # nothing left to do

    _, (experiment,) = load_sweep(sweep)
    assert experiment.finished()
    tree["entries"][0]["set"] = ["tokens.size=32"]
    sweep.write_text(yaml.safe_dump(tree))
    assert not load_sweep(sweep)[1][0].finished()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entries": [{"name": "a"}, {"name": "a"}]}, "two named 'a'"),
        ({"entries": []}, "entries"),
        ({"entries": [{"name": "a", "set": ["tokens.sice=3"]}]}, "did you mean 'size'"),
        ({"config": None}, "no configuration"),
        ({"jobs": 3}, "jobs"),
    ],
)
def test_mistakes_in_a_sweep_file_are_named(sweep, change, message):
    sweep.write_text(yaml.safe_dump({**yaml.safe_load(sweep.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        load_sweep(sweep)


def test_the_sweeps_that_come_with_the_package_are_valid():
    folder = Path(__file__).parents[3] / "configs" / "sweeps"
    for path in sorted(folder.glob("*.yaml")):
        assert load_sweep(path)[1]

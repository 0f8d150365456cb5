import json
from pathlib import Path

import pytest
import torch
import yaml

from rpg.config import Config
from rpg.evaluation.starts import best_of, fine_tuning, reptile
from rpg.experiments.driver import experiment_of, run_experiment
from rpg.experiments.sensors import evaluate_sensors, task_of_sensors, tuned_regression
from rpg.generation.generator import Generator
from rpg.tasks.side_by_side import repeat
from tests.reports import checked_report
from tests.rpg.tasks.sensors.test_sensors import SMALL, Planted, small_task
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

MODEL = {
    "state": {"of": "none"}, "condition": {"kind": "vector"},
    "backbone": {"kind": "lstm", "d_model": 16, "num_layers": 1}, "denoiser": {"kind": "decoder", "width": 16},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sensors")
    tree = {
        "run": str(folder / "run"), "zoo": str(folder / "zoo"), "task": {"name": "sensors", **SMALL}, "model": MODEL,
        "train": {"steps": 3, "batch_size": 4, "behaviour": {"images": 8, "tasks": "fresh", "networks": 3}},
        "evaluate": {"informed": 3, "fine_tuning": [0, 4], "meta_learning": 2},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    config = Config.parse(tree, "test")
    run_experiment(config, experiment_of(config), seeds=2)
    return folder / "run"


def test_a_run_of_sensors_reports_every_rival(run: Path) -> None:
    report = checked_report(run, "sensors", "sensors")
    assert {"generated", "original", "kernel_ridge", "nearest_seen", "generalist", "average"} < report.kinds.keys()
    assert {"settings_as_inputs", "large_with_settings"} < report.kinds.keys()
    assert all(len(each.metrics["accuracy"]) == 3 for each in report.kinds.values())
    assert "large_with_settings" not in report.rivals() and "original" not in report.rivals()
    assert report.kinds["generated"].conditions == tuple(map(tuple, small_task().sensors()[0][8:].tolist()))
    curve = report.curves["accuracy_by_angle"]
    assert curve.x[0] == 0 and curve.x[-1] == 360
    assert curve.lines["generalist"][0] == pytest.approx(curve.lines["generalist"][-1], abs=0.01)  # a full circle
    starts = report.curves["as_a_start"].lines
    assert set(starts) == {"generated", "best_specialist", "generalist", "random", "reptile"}
    assert starts["generated"][0] == pytest.approx(report.mean("generated"))
    assert 0 < report.facts["fine-tuning milliseconds a step"] < 100
    figures, generator = report.extras["error_by_distance"], Generator.from_pretrained(run)
    assert figures["beyond"] + len(report.curves["error_by_distance"].x) == 3
    seen = generator.distance(small_task().sensors()[0][0])
    assert seen is not None and seen.distance == 0 and seen.known_to == figures["known_to"]
    accuracy = report.extras["over_seeds"][""]["generated"]["accuracy"]
    first, second = accuracy["values"]
    assert accuracy["mean"] == pytest.approx((first + second) / 2) and first == pytest.approx(report.mean("generated"))
    assert accuracy["ci95"][1] - accuracy["mean"] == pytest.approx(12.706 * abs(first - second) / 2, rel=1e-3)
    assert "settings_as_inputs" not in report.extras["over_seeds"][""]  # trained once
    assert [each["seed"] for each in report.facts["seeds"]] == [0, 1] and (run / "seed-1" / "generator").is_dir()
    assert "must be small, here 610 values" in report.notes[0]
    assert (run / "report.html").is_file() and (run / "accuracy_by_angle.png").is_file()


def test_choices_are_made_on_validation_sensors_and_write_nothing(run: Path) -> None:
    before = (run / "evaluation.json").read_bytes()
    report = evaluate_sensors(run, split="validation")
    assert report.kinds["generated"].count == 2 and report.split == "validation"
    assert (run / "evaluation.json").read_bytes() == before


def test_kernel_ridge_is_exact_where_the_answer_is_linear_in_what_it_sees(run: Path) -> None:
    zoo, task = Zoo.open(run.parent / "zoo"), small_task()
    seen = {name: value[:6] for name, value in repeat(zoo.state_dict(0), 11).items()}
    _, predicted = tuned_regression(task, zoo, seen)  # all networks alike: so is every prediction
    made = predicted(task.sensors()[0][8:])
    assert all(torch.allclose(value, seen[name][:3], atol=1e-5) for name, value in made.items())


def test_fine_tuning_reaches_the_known_answer_from_any_start_and_sooner_from_a_near_one() -> None:
    task = Planted()
    task.accuracies = lambda weights, conditions, split: -(weights["weight"][:, 0] - task.right(conditions)).norm(dim=1)
    angles = torch.tensor([[30.0], [200.0]])
    right = {"weight": task.right(angles)[:, None]}
    starts = {"right": right, "zero": {"weight": torch.zeros(2, 1, 2)}}
    found = fine_tuning(task, starts, angles, (0, 10, 300))
    assert torch.allclose(found["right"][0], torch.zeros(2), atol=1e-6)
    assert torch.allclose(found["zero"][0], -torch.ones(2))
    assert (found["zero"][1] > found["zero"][0]).all() and (found["zero"][2] > -0.02).all()
    assert best_of(task, {"weight": torch.cat([right["weight"].flip(0)])}, angles).tolist() == [1, 0]


def test_reptile_learns_the_weights_between_those_of_all_tasks() -> None:
    learned = reptile(Planted(), {"weight": torch.ones(1, 2)}, 15.0 * torch.arange(24)[:, None], 150, tasks=24)
    assert learned["weight"].abs().max() < 0.1  # directions all around cancel


def test_what_is_no_run_of_sensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="task.name is none, .* see configs/sensors.yaml"):
        task_of_sensors(Config.parse({"run": str(tmp_path / "run"), "task": None}, "test"))


def test_rpg_evaluate_judges_sensors_as_sensors(run: Path, rpg) -> None:
    code, out, err = rpg("evaluate", run)
    assert code == 0, err
    rows = ("generated", "trained for the sensor", "kernel ridge")
    assert all(row in out for row in rows) and "nearest" in out and "--setting angle=137" in out
    assert json.loads((run / "evaluation.json").read_text())["experiment"] == "sensors"
    code, _, err = rpg("evaluate", run, "--num", 3)
    assert code == 2 and err.startswith("error: --num is not for runs of sensors")

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rpg.config import Config
from rpg.evaluation.config import EvaluateConfig
from rpg.experiments.sweep import load_sweep, run_sweep
from rpg.experiments.sweep_table import figures_of, markdown_table, rows_of_rivals
from rpg.section import read_variants
from tests.conftest import configurations, small_config
from tokenization.errors import InputError

NOISE = EvaluateConfig().noise
CONFIGS = Path(__file__).parents[3] / "configs"


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
    lines = (table.parent / "similarity.md").read_text().splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["original", *(f"noise {s}" for s in NOISE), "generated"]
    assert (table.parent / "similarity.png").stat().st_size > 5000

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
    "config, message",
    [
        ("detection.yaml", "the task detection"),
        ("segmentation.yaml", "the task segmentation"),
        ("unet.yaml", "the task diffusion_unet"),
        ("gpt.yaml", "the task trajectories"),
        ("tickets.yaml", "the task tickets"),
        ("digits_unseen.yaml", "learns from the validation split"),
        ("fields3d.yaml", "learns from the validation split"),
    ],
)
def test_what_a_sweep_cannot_score_is_refused_before_anything_is_trained(tmp_path, config, message):
    path, run = tmp_path / "sweep.yaml", str(tmp_path / "out")
    changes = ["evaluate.split=validation", f"zoo={tmp_path / 'zoo'}"]
    tree = {"config": str(CONFIGS / config), "run": run, "set": changes, "entries": [{"name": "only"}]}
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(InputError, match=f"{message}"):
        run_sweep(path)
    assert not (tmp_path / "out").exists() and not (tmp_path / "zoo").exists()


def test_checkpoints_without_a_task_are_refused_by_a_sweep(tmp_path, zoo):
    small_config(tmp_path).save(tmp_path / "base.yaml")
    tree = {"config": "base.yaml", "run": str(tmp_path / "sweep"), "entries": [{"name": "only"}]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(InputError, match="entry 'only'.*without a task.*rpg run"):
        run_sweep(tmp_path / "sweep.yaml")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entries": [{"name": "a"}, {"name": "a"}]}, "two entries named 'a'"),
        ({"entries": []}, "entries"),
        ({"entries": [{"name": "a", "set": ["tokens.sice=3"]}]}, "did you mean 'size'"),
        ({"config": None}, "no configuration"),
        ({"matrix": {"name": "{size}", "axes": {"width": {"s": []}}}}, "matrix.*'size'"),
        ({"matrix": {"name": "a b {width}", "axes": {"width": {"s": []}}}}, "'a b s'"),
        ({"matrix": {"name": "all", "axes": {"width": {"s": [], "l": []}}}}, "two entries named 'all'"),
        ({"jobs": 3}, "jobs"),
    ],
)
def test_mistakes_in_a_sweep_file_are_named(sweep, change, message):
    sweep.write_text(yaml.safe_dump({**yaml.safe_load(sweep.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        load_sweep(sweep)


def test_a_matrix_is_every_combination_of_its_axes(sweep, tmp_path):
    matrix = {
        "name": "{width}-{steps}",
        "set": ["zoo={name}"],
        "axes": {"width": {"s": ["tokens.size=8"], "l": ["tokens.size=32"]}, "steps": {"short": ["train.steps=3"]}},
    }
    tree = {"config": "base.yaml", "run": str(tmp_path / "out"), "matrix": matrix}
    sweep.write_text(yaml.safe_dump(tree, sort_keys=False))
    _, experiments = load_sweep(sweep)
    assert [each.name for each in experiments] == ["s-short", "l-short"]
    assert [each.config.tokens.size for each in experiments] == [8, 32]
    assert [(each.config.train.steps, each.config.zoo) for each in experiments] == [(3, "s-short"), (3, "l-short")]
    with pytest.raises(InputError, match="no entry named 'm-short'.*s-short, l-short"):
        run_sweep(sweep, only=["m-short"])


FILE = """\
extends: {base}
run: runs/pdiff/{name}
zoo: runs/zoos/pdiff/{name}
task:
  network: {network}
  dataset: {dataset}
  data: data/{folder}
  base: runs/zoos/pdiff/{name}-base.safetensors
"""


def test_the_matrix_of_pdiff_networks_is_what_its_42_files_were(tmp_path):
    experiments = {each.name: each.config for each in load_sweep(CONFIGS / "sweeps" / "pdiff-networks.yaml")[1]}
    networks = ["convnext_base", "convnext_tiny", "resnet18", "resnet50", "vit_base", "vit_tiny"]
    datasets = ["cifar10", "cifar100", "flowers102", "food101", "imagenet", "pets", "stl10"]
    assert list(experiments) == [f"{network}_{dataset}" for network in networks for dataset in datasets]
    for name, config in experiments.items():
        network, folder = name.rsplit("_", 1)
        text = FILE.format(
            base=CONFIGS / "pdiff" / "base.yaml", name=name, folder=folder,
            network=f"{network}_patch16_224" if "vit" in network else network,
            dataset="folder" if folder == "imagenet" else folder,
        )  # fmt: skip
        (tmp_path / "file.yaml").write_text(text + "  train_epochs: 0\n" * (folder == "imagenet"))
        assert config == Config.load(tmp_path / "file.yaml"), name


def test_the_sweeps_that_come_with_the_package_are_valid():
    for path in configurations(CONFIGS / "sweeps"):
        if not read_variants(path):
            assert load_sweep(path)[1]


def two_samples(nearest: str) -> dict:
    return {"nearest_neighbour_accuracy": 0.7, "coverage": 0.4, nearest: 1.5}


ACCURACY = {"mean": 0.9, "max": 1.0, "min": 0.8}


def test_the_table_reads_reports_on_tasks_fields_and_held_out_checkpoints(tmp_path):
    """One form for all three: each method's accuracy, 1-NNA, coverage and distance to the nearest original."""
    tasks = {
        "unseen": {name: {"accuracy": ACCURACY} for name in ("generated", "original", "kernel_ridge", "average")},
        "per_task": {
            "methods": {
                "generated": {"error_iou": 0.6, **two_samples("nearest")},
                "kernel_ridge": {"error_iou": 1.0, **two_samples("nearest")},
                "original": {"error_iou": 0.5, "nearest_neighbour_accuracy": None},
            }
        },
    }
    fields = {
        name: {"one_nna": 0.7, "coverage": 0.4, "nearest": 1.5, "class_accuracy": 0.9}
        for name in ("generated", "midpoint")
    } | {"held_out": {"num": 3, "class_accuracy": 1.0}}
    single = {
        "generated": {"accuracy": ACCURACY, "similarity": {"mean": 0.6}},
        "baselines": {"interpolation": {"accuracy": ACCURACY}},
        "two_sample": {"sets": {name: two_samples("nearest_training") for name in ("generated", "midpoint")}},
    }
    for report in (tasks, fields, single):
        made = figures_of(report)["generated"]
        assert (made["mean"], made["one_nna"], made["coverage"], made["nearest"]) == (0.9, 0.7, 0.4, 1.5)
    folders = [tmp_path / name for name in ("tasks", "fields", "none")]
    for folder, report in zip(folders, (tasks, fields), strict=False):
        folder.mkdir()
        (folder / "evaluation.json").write_text(json.dumps(report))
    rows = {row["name"]: row for row in rows_of_rivals(folders)}
    assert sorted(rows) == ["kernel_ridge", "midpoint", "original"]  # those that nothing is compared with are left out
    table = markdown_table(list(rows.values()))
    assert "1-NNA" in table and "s training" not in table  # a column that no row has is not shown

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rpg.config import EvaluateConfig
from rpg.evaluation.report import Report, networks
from rpg.experiments.sweep import load_sweep, markdown_table, readable_reports, row_of, rows_of_rivals, run_sweep
from rpg.section import read_variants
from tests.conftest import configurations, small_config
from tokenization.errors import InputError

NOISE = EvaluateConfig().noise
CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    task = {"name": "digits", "network": "mlp-mini", "train_steps": 20, "steps": 4, "batch_size": 16}
    small_config(tmp_path, task=task, evaluate={"num": 3, "num_baseline": 2, "baselines": ["noise"]}).save(
        tmp_path / "base.yaml"
    )
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


@pytest.mark.slow
def test_a_sweep_runs_once_survives_a_failure_and_reruns_what_changed(tmp_path, sweep):
    said: list[str] = []
    table = run_sweep(sweep, jobs=2, say=said.append)
    assert any(line.startswith("wide: ") and line.endswith(" s), done") for line in said)
    assert any("tokens.include" in line for line in said)
    rows = json.loads((table.parent / "table.json").read_text())
    assert [row["name"] for row in rows] == ["wide", "broken"]
    found = Report.load(tmp_path / "sweep" / "wide").kinds["generated"].metrics["accuracy"]
    assert rows[0]["mean"] == pytest.approx(sum(found) / 3) and rows[0]["best"] == max(found)
    assert len(found) == 3 and rows[0]["training_seconds"] > 0
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
    ("changes", "steps"),
    [
        ([[]], [[], ["both"]]),  # alone with its zoo
        ([[], []], [["collect"], ["run", "run"]]),
        ([[], ["task=null"]], [["collect"], ["run", "run"]]),  # nobody else knows how the zoo is made
        ([["task=null"]], [[], ["run"]]),
    ],
)
def test_a_zoo_is_collected_once_by_an_entry_that_knows_how(sweep, monkeypatch, changes, steps):
    tree = yaml.safe_load(sweep.read_text())
    tree["entries"] = [{"name": f"{number}", "set": each} for number, each in enumerate(changes)]
    sweep.write_text(yaml.safe_dump(tree))
    done = []

    def record(title, todo, *_):
        done.append(todo)
        return {each.name: "not run" for _, each in todo} if title == "training and scoring" else {}

    monkeypatch.setattr("rpg.experiments.sweep._in_parallel", record)
    run_sweep(sweep, say=lambda line: None)
    assert [[step for step, _ in each] for each in done] == steps
    assert all(each.config.task is not None for todo in done for step, each in todo if step != "run")


@pytest.mark.parametrize(
    "config, message",
    [
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


@pytest.mark.slow
def test_a_sweep_of_checkpoints_without_a_task_compares_their_weights(tmp_path, zoo):
    few = {"num": 2, "num_baseline": 2, "baselines": ["interpolation"]}
    small_config(tmp_path, zoo=str(zoo.path), evaluate=few).save(tmp_path / "base.yaml")
    tree = {"config": "base.yaml", "run": str(tmp_path / "sweep"), "entries": [{"name": "only"}]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))
    table = run_sweep(tmp_path / "sweep.yaml", say=lambda line: None)
    (row,) = json.loads((table.parent / "table.json").read_text())
    assert "failure" not in row and row["distance"] > 0 and "mean" not in row
    assert Report.load(tmp_path / "sweep" / "only").judge == "weights alone"


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


def test_pdiff_networks_is_a_matrix_of_networks_and_data():
    experiments = {each.name: each.config for each in load_sweep(CONFIGS / "sweeps" / "pdiff-networks.yaml")[1]}
    networks = ["convnext_base", "convnext_tiny", "resnet18", "resnet50", "vit_base", "vit_tiny"]
    datasets = ["cifar10", "cifar100", "flowers102", "food101", "imagenet", "pets", "stl10"]
    assert list(experiments) == [f"{network}_{dataset}" for network in networks for dataset in datasets]
    for name, network, dataset, epochs in (
        ("resnet18_cifar100", "resnet18", "cifar100", None),
        ("vit_base_imagenet", "vit_base_patch16_224", "folder", 0),
    ):
        config, folder = experiments[name], name.rsplit("_", 1)[1]
        assert (config.run, config.zoo) == (f"runs/pdiff/{name}", f"runs/zoos/pdiff/{name}")
        assert (config.task.network, config.task.dataset, config.task.data) == (network, dataset, f"data/{folder}")
        assert config.task.base == f"{config.zoo}-base.safetensors"
        assert epochs is None or config.task.train_epochs == epochs


def test_the_sweeps_that_come_with_the_package_are_valid():
    for path in configurations(CONFIGS / "sweeps"):
        if not read_variants(path):
            assert load_sweep(path)[1]


def test_the_table_reads_every_report(tmp_path):
    def report(metric: str, better: str, **kinds: float) -> Report:
        made = {n: networks({metric: [v, v]}, extras={"one_nna": 0.7, "coverage": 0.4}) for n, v in kinds.items()}
        return Report(
            experiment="tasks", judge="t", split="test", seed=0, better={metric: better}, kinds=made,
        )  # fmt: skip

    first = report("accuracy", "more", original=0.95, generated=0.9, kernel_ridge=0.8)
    for number, found in enumerate((first, report("ap50", "more", original=1, generated=1))):
        (tmp_path / str(number)).mkdir()
        found.save(tmp_path / str(number))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "evaluation.json").write_text("{}")
    rows = rows_of_rivals(readable_reports({name: tmp_path / name for name in ("0", "1", "old", "none")}).values())
    assert sorted(row["name"] for row in rows) == ["kernel_ridge", "original"]  # the originals of the first
    table = markdown_table(rows)
    assert "| kernel_ridge | 80.0 | 80.0 | 80.0 | 0.70 | 0.40 |" in table and "s training" not in table
    assert "earlier version" in row_of("x", [], tmp_path / "old")["failure"]

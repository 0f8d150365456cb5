"""The page of an experiment on unseen tasks: of image classes and of adapters."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from rpg.devices import join_processes
from rpg.evaluation.report import Report
from rpg.evaluation.workers import Workers
from rpg.experiments.tasks_page import head_of, requested_task, task_name, worst_table
from rpg.experiments.unseen_tasks import evaluate_unseen, task_family
from rpg.generation.generator import Generator
from tests.processes import in_two_processes
from tests.rpg.conftest import Run
from tests.rpg.evaluation.test_page import Page
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo


@pytest.mark.parametrize("name", ["unseen", "lora"])
def test_the_page_shows_what_was_measured(name: str, request: pytest.FixtureRequest) -> None:
    config, report = request.getfixturevalue(name)
    text, page = (Path(config.run) / "report.html").read_text(), Page()
    page.feed(text)
    assert not page.open and all(each.startswith(("data:", "#")) for each in page.references if each)
    for heading in ("Metrics: seen", "of each network", "Worst tasks", "Parameters", "Provenance"):
        assert heading in text
    for method in report.kinds:
        assert method.replace("_", " ") in text
    assert report.verdict in text and f"rpg {name}" in text
    assert sum("Parameters as colours" in str(each.get("alt")) for each in page.pictures) == 2


def test_two_processes_find_the_figures_of_one(unseen, lora, tmp_path: Path) -> None:
    """Of images and of adapters; what is written is what one process wrote."""
    runs = []
    for name, (config, _) in {"unseen": unseen, "lora": lora}.items():
        runs.append(tmp_path / name)
        shutil.copytree(config.run, runs[-1])
        (runs[-1] / "evaluation.json").unlink()

    def score() -> None:
        partition, _ = join_processes("cpu")
        for run in runs:
            evaluate_unseen(run, workers=Workers(partition))

    in_two_processes(score)
    for run, (config, _) in zip(runs, (unseen, lora), strict=True):
        one, two = Report.load(config.run), Report.load(run)
        assert ("over_seeds" in one.extras) == (run is runs[0])
        found = one.model_copy(
            update={"facts": {}, "extras": {k: v for k, v in one.extras.items() if k != "over_seeds"}}
        )
        assert two.model_copy(update={"facts": {}}) == found
        assert set(one.facts) - set(two.facts) == {
            "collect_seconds",
            "seconds",
            *(("seeds",) if run is runs[0] else ()),
        }


def test_worst_tasks_are_sorted_and_named(unseen) -> None:
    _, report = unseen
    rows = worst_table(report, [f"digit {i}" for i in range(10)]).rows
    values = sorted(report.kinds["generated"].metrics["accuracy"])[: len(rows)]
    assert [row[1] for row in rows] == [f"{100 * value:.1f} %" for value in values]
    assert all("digit" in row[0] for row in rows)
    assert f"({100 * min(report.extras['worst'][0]['accuracy_of_class']):.1f} %)" in rows[0][4]
    assert task_name([1, 0, 1], ["a", "b", "c"]) == "a, c" and task_name([1.0, 0.0, 1.0], ()) == "101"


def test_the_head_is_the_last_matrix(unseen, lora) -> None:
    config, _ = unseen
    head = head_of(Generator.from_pretrained(config.run))
    network = Zoo.open(config.zoo).state_dict(0)
    assert network[head].ndim == 2 and network[head].shape[0] == 2  # one logit a side
    assert head_of(Generator.from_pretrained(lora[0].run))


def test_denoising_paths_end_at_the_networks_of_the_condition(unseen) -> None:
    config, _ = unseen
    generator = Generator.from_pretrained(config.run)
    bits = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0, 0, 0])
    made = generator.generate(2, seed=3, condition=bits)
    step, last = generator.denoising_paths(2, seed=3, condition=bits)[-1]
    assert step == config.generate.steps
    assert all(torch.equal(a[name], b[name]) for a, b in zip(made, last, strict=True) for name in a)
    with pytest.raises(InputError, match="condition"):
        generator.denoising_paths(2)


def test_the_user_names_the_condition_whose_denoising_path_is_shown(unseen, tmp_path: Path) -> None:
    config, _ = unseen
    generate = config.generate.model_copy(update={"steps": 3})
    config = config.model_copy(update={"run": str(tmp_path / "run"), "generate": generate})
    shutil.copytree(unseen[0].run, config.run)
    config.save(tmp_path / "run" / "generator" / "config.yaml")
    names, task = Zoo.open(config.zoo).condition.names, task_family(config)
    bits = requested_task(task, config, f"{names[3]},{names[7]}")
    assert bits == requested_task(task, config, "0001000100") == requested_task(task, config, "0,0,0,1,0,0,0,1,0,0")
    evaluate_unseen(config.run, path_condition=bits)
    text = (tmp_path / "run" / "report.html").read_text()
    assert f"for the task {names[3]}, {names[7]} after each" in text and "for the unseen task" not in text
    for wrong in ("3,12", "1111111111", "no class"):
        with pytest.raises(InputError, match="--denoising-path"):
            requested_task(task, config, wrong)
    with pytest.raises(InputError, match=r"generate\.steps"):
        requested_task(task, unseen[0], "0001000100")


def test_the_command_writes_the_page(lora, rpg: Run) -> None:
    config, _ = lora
    page = Path(config.run) / "report.html"
    page.unlink(missing_ok=True)
    code, out, err = rpg("lora", Path(config.run) / "config.yaml", "--split", "validation", "--device", "cpu")
    assert (code, err) == (0, "") and "report" not in out and not page.exists()
    code, out, err = rpg("lora", Path(config.run) / "config.yaml", "--split", "test", "--device", "cpu")
    assert (code, err) == (0, "") and "report.html" in out and "rpg lora --split test" in page.read_text()

"""Scoring from the command line: the README's example, zoos, single checkpoints, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rpg.devices import join_processes
from rpg.evaluation.report import Report
from rpg.evaluation.workers import Workers
from rpg.experiments import score_files
from rpg.experiments.evaluating import Judge, evaluate_run, evaluate_zoo
from rpg.generation.generator import Generator
from rpg.tasks import DigitsConfig, build_task
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config
from tests.processes import in_two_processes
from tests.reports import checked_report
from tests.rpg.conftest import Run, refused
from tokenization.zoo.zoo import Zoo

ROOT = Path(__file__).parent.parent.parent
FUNCTION = "def norm(state_dict):\n    return {'norm': state_dict['3.weight'].norm(), 'mean_loss': 1.5}\n"
CONDITIONAL = "def score(path, condition):\n    return len(condition)\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a zoo and a function."""
    monkeypatch.chdir(tmp_path)
    make_zoo(tmp_path / "zoo")
    (tmp_path / "mine.py").write_text(FUNCTION)
    return tmp_path


def readme_blocks() -> tuple[str, list[str]]:
    """The README's digits.py and the commands below it."""
    text = (ROOT / "README.md").read_text()
    found = re.search(r"As `digits\.py`.*?```python\n(.*?)```.*?```sh\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1], [line.split("#")[0].strip() for line in found[2].splitlines()]


def test_the_example_of_the_readme(rpg: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, commands = readme_blocks()
    (tmp_path / "digits.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "digits.py"], check=True, timeout=120)
    few = ["--set", "evaluate.num=4", "--set", "evaluate.num_baseline=3"]
    lines = [line.removeprefix("python digits.py && ").replace("'", "") for line in commands]
    assert [line.split()[1] for line in lines] == ["collect", "evaluate", "inspect", "train", "evaluate", "score"]
    for line in lines:
        words = line.split()[1:]
        more = {"train": ["--set", "train.steps=40"], "evaluate": few[2 if "own-zoo" in words[1:2] else 0 :]}
        code, out, err = rpg(*words, *more.get(words[0], []))
        assert (code, err) == (0, ""), line
    assert "run0_step39.safetensors" in out
    own = {"own-zoo": "score_of_zoo", "runs/own-zoo": "score_of_run"}
    of_zoo, of_run = (checked_report(path, "networks", record) for path, record in own.items())
    assert of_zoo.kinds["original"] == of_run.kinds["original"] and of_zoo.kinds["generated"].count == 0
    assert of_run.mean("original") > 0.9 and of_run.mean("run_average") > 0.9  # type: ignore[operator]
    assert of_run.mean("average") < 0.7  # type: ignore[operator]
    generated = of_run.kinds["generated"]
    assert len(generated.metrics["accuracy"]) == 4 == len(generated.distances["nearest"]) and not of_run.matched
    page = Path("runs/own-zoo/report.html").read_text()
    assert "digits:accuracy" in page and page.count("<svg") >= 4
    assert "http" not in re.sub(r"http://www\.w3\.org\S+", "", page)
    assert Path("runs/own-zoo/scatter.png").stat().st_size > 1000


def test_a_zoo_is_scored_by_its_own_task(rpg: Run, tmp_path: Path) -> None:
    task = DigitsConfig(network="mlp-mini", train_steps=60, steps=4, batch_size=64)
    zoo = build_task(task).collect(tmp_path / "zoo")
    few = ["--set", "evaluate.num_baseline=2", "--set", "evaluate.baselines=[interpolation]"]
    code, out, err = rpg("evaluate", zoo.path, *few, "--output", tmp_path / "out")
    assert (code, err) == (0, "") and "DigitsTask, test data" in out
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(found["kinds"]) == ["original", "generated", "average", "interpolation"]
    expected = [
        build_task(task).predict([zoo.state_dict(i)])[0].eq(build_task(task).labels()).double().mean().item()
        for i in range(4)
    ]
    assert found["kinds"]["original"]["metrics"]["accuracy"] == pytest.approx(expected)
    code, out, err = rpg("score", zoo.path, zoo.file(1))
    assert code == 2 and "nothing says how to score" in err
    code, out, err = rpg("score", zoo.path)
    assert (code, err) == (0, "") and "accuracy" in out and out.count("safetensors") == 4


def test_files_of_any_kind_are_scored(rpg: Run, here: Path) -> None:
    torch.save({"3.weight": torch.ones(5, 12)}, "other.pth")
    code, out, err = rpg("score", "other.pth", Zoo.open("zoo").file(0), "--score", "mine.py:norm")
    assert (code, err) == (0, "") and all(each in out for each in ("7.74597", "mean", "loss"))
    (here / "by_path.py").write_text("def score(path):\n    return len(path.name)\n")
    code, out, err = rpg("score", "other.pth", "--score", "by_path:score")
    assert (code, err) == (0, "") and re.search(r"other.pth +9\n", out)


def test_one_task_scores_all_files(rpg: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    build = score_files.build_task
    monkeypatch.setattr(score_files, "build_task", lambda config: built.append(config) or build(config))
    torch.save(build(DigitsConfig()).build().state_dict(), "one.pth")
    for name in ("two.pth", "three.pth"):
        Path(name).write_bytes(Path("one.pth").read_bytes())
    Path("task.yaml").write_text("task: {name: digits}\n")
    code, out, err = rpg("score", "one.pth", "two.pth", "three.pth", "task.yaml")
    assert code == 0, err
    assert len(built) == 1 and out.count(".pth") == 3


def test_networks_of_a_conditional_generator_are_made_for_conditions_of_the_zoo(rpg: Run, here: Path) -> None:
    make_zoo(here / "conditional", condition_size=2)
    config = small_config(
        here, zoo=str(here / "conditional"), model={"condition": {"kind": "binary"}}, train={"steps": 2}
    )
    train(config, say=lambda _: None)
    (here / "conditional.py").write_text(CONDITIONAL)
    code, _, err = rpg("evaluate", "run", "--score", "conditional:score", "--num", 3)
    assert (code, err) == (0, ""), err
    found = json.loads(Path("run/evaluation.json").read_text())
    assert found["kinds"]["generated"]["metrics"]["score"] == [2.0, 2.0, 2.0]


def test_without_anything_that_scores_networks_are_told_apart_by_their_weights(rpg: Run, here: Path) -> None:
    train(small_config(here, train={"steps": 2}), say=lambda _: None)
    few = ["--set", "evaluate.num_baseline=2", "--set", "evaluate.baselines=[interpolation]"]
    for given in (["run", "--num", 2], ["zoo", *few]):
        code, out, err = rpg("evaluate", *given)
        assert (code, err) == (0, "") and "weights alone" in out and "Nothing scores" in out, err
        found = checked_report(str(given[0]), "networks").model_dump()
        assert found["better"] == {} and found["threshold"] is None
        made = found["kinds"]["generated" if given[0] == "run" else "original"]
        taus, distances = found["taus"], made["distances"]["nearest"]
        shares = [sum(each >= tau for each in distances) / len(distances) for tau in taus]
        assert made["novel"] == pytest.approx(shares) and made["metrics"] == {}
        assert Path(str(given[0]), "scatter.png").stat().st_size > 1000
        assert "Where the networks lie" in Path(str(given[0]), "report.html").read_text()


def test_networks_for_conditions_are_compared_with_the_originals_of_these(rpg: Run, here: Path) -> None:
    zoo = make_zoo(here / "conditional", condition_size=2)
    config = small_config(
        here, zoo=str(zoo.path), model={"condition": {"kind": "binary"}},
        train={"steps": 2}, evaluate={"num_baseline": 3, "baselines": ["nearest_seen", "kernel_ridge"]},
    )  # fmt: skip
    train(config, say=lambda _: None)
    code, out, err = rpg("evaluate", "run", "--num", 3, "--denoising-path", "01")
    assert (code, err) == (0, "") and re.search(r"to its( own|.*\n.* own)", out), err
    found = json.loads(Path("run/evaluation.json").read_text())
    assert list(found["kinds"]) == ["original", "generated", "nearest_seen", "kernel_ridge", "average"]
    own = found["kinds"]["average"]["distances"]["own"]
    assert len(own) == 3 and all(each > 0 for each in own)
    nearest = found["kinds"]["nearest_seen"]
    assert (
        nearest["distances"]["nearest"] == pytest.approx([0.0] * 3, abs=1e-3) and min(nearest["distances"]["own"]) > 0.5
    )
    page = Path("run/report.html").read_text()
    assert "distance to its own original" in page and "Networks for 01 after each sampling step" in page
    refused(rpg("evaluate", "run", "--denoising-path", "0,1,1"), "--denoising-path")


def score_everything(folder: Path, output: Path) -> None:
    """Write the results of every way of scoring."""
    partition, _ = join_processes("cpu")
    judge, run = Judge(f"{folder}/mine.py:norm"), folder / "run"
    config = Generator.from_pretrained(run).config
    evaluate_zoo(config.zoo, judge, config, output=output / "zoo", workers=Workers(partition))
    evaluate_run(run, num=3, output=output / "task", workers=Workers(partition))
    found = score_files.score_checkpoints([Path(config.zoo)], None, None, "test", Workers(partition))
    if partition.rank == 0:
        (output / "files.json").write_text(json.dumps(found))


def test_two_processes_find_the_figures_of_one(tmp_path: Path) -> None:
    """Of networks cut into several tiles, which `rpg generate` would share tile by tile; in every way of scoring."""
    task = DigitsConfig(network="mlp-mini", train_steps=60, steps=6, batch_size=64)
    build_task(task).collect(tmp_path / "zoo")
    few = ["noise", "interpolation", "low_rank_gaussian_at_distance"]
    sections = {
        "generate": {"tile_tokens": 50},
        "train": {"steps": 2},
        "evaluate": {"num_baseline": 2, "baselines": few},
    }
    train(small_config(tmp_path, task=task.model_dump(), **sections), say=lambda _: None)
    (tmp_path / "mine.py").write_text("def norm(state_dict):\n    return next(iter(state_dict.values())).norm()\n")
    in_two_processes(lambda: score_everything(tmp_path, tmp_path / "two"))
    score_everything(tmp_path, tmp_path / "one")
    files = sorted(each.relative_to(tmp_path / "one") for each in (tmp_path / "one").rglob("*.json"))
    assert len(files) == 3
    for file in files:
        one, two = (
            re.sub(r'"seconds_per_network": [\d.e-]*', "", (tmp_path / n / file).read_text()) for n in ("one", "two")
        )
        assert one == two, file
    for name in ("zoo", "task"):
        assert (tmp_path / "two" / name / "report.html").exists()


def test_scores_of_a_function_are_not_replaced_by_those_of_none(rpg: Run, here: Path) -> None:
    train(small_config(here, train={"steps": 2}, evaluate={"num": 2, "baselines": []}), say=lambda _: None)
    few = ["--set", "evaluate.baselines=[]"]
    for path in ("run", "zoo"):
        assert rpg("evaluate", path, "--score", "mine:norm", *few)[0] == 0
        before = Path(path, "evaluation.json").read_bytes()
        refused(rpg("evaluate", path, *few), "mine:norm scored", "--score mine:norm", "--output")
        assert Path(path, "evaluation.json").read_bytes() == before
    code, _, err = rpg("evaluate", "zoo", *few, "--output", "weights")
    assert (code, err) == (0, "") and Report.load("weights").judge == "weights alone"
    assert rpg("evaluate", "zoo", "--score", "mine:norm", *few)[0] == 0


def test_settings_of_a_run_s_evaluation_can_be_changed(rpg: Run, here: Path) -> None:
    train(small_config(here, train={"steps": 2}, evaluate={"num": 2}), say=lambda _: None)
    changes = ["--set", "evaluate.baselines=[interpolation]", "--set", "evaluate.split=validation"]
    assert rpg("evaluate", "run", *changes, "--score", "mine:norm")[0] == 0
    report = Report.load("run")
    assert list(report.kinds) == ["original", "generated", "average", "interpolation"] and report.split == "validation"
    frame = report.to_frame()
    assert (
        list(frame.columns) == ["kind", "norm", "mean_loss", "distance_nearest", "distance_plain"][: len(frame.columns)]
    )
    assert frame["kind"].value_counts()["original"] == 6 and frame["mean_loss"].eq(1.5).all()


def test_what_is_refused(rpg: Run, here: Path) -> None:
    train(small_config(here, train={"steps": 2}))
    refused(rpg("evaluate", "zoo", "--num", 3, "--score", "mine:norm"), "--num")
    refused(rpg("evaluate", "run", "--score", "mine:norm", "--set", "seed=1"), "--set")
    refused(rpg("evaluate", "run", "--lower", "norm"), "--score")
    refused(rpg("evaluate", "run", "--score", "mine:other"), "other")
    refused(rpg("evaluate", "zoo", "--score", "mine:norm", "--lower", "nrom"), "nrom", "norm, mean_loss")
    refused(rpg("score", "zoo"), "--score")
    refused(rpg("score", "none.safetensors", "--score", "mine:norm"), "none.safetensors")
    refused(rpg("score", "a.yaml", "b.yaml", "zoo"), "CONFIG")
    (here / "mine2.py").write_text("def norm(state_dict):\n    return state_dict['none'].norm()\n")
    refused(rpg("evaluate", "zoo", "--score", "mine2:norm"), "KeyError", "line 2")

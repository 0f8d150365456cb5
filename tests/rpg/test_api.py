"""The package as a notebook meets it: names, completion, a file in place of a configuration, another folder."""

from __future__ import annotations

from pathlib import Path

import pytest

import rpg
from rpg.console import progress_bar
from tests.conftest import make_zoo, small_config
from tokenization.checkpoint.checkpoint import StateDict
from tokenization.errors import InputError


def test_completion_offers_every_name_and_each_is_there() -> None:
    names = {"Config", "Generator", "InputError", "Zoo", "build_task", "collect", "collect_from", "evaluate", "inspect"}
    assert names | {"propose", "train"} <= set(dir(rpg))
    assert all(getattr(rpg, name) is not None for name in rpg.__all__)


def test_a_file_is_trained_and_a_folder_is_proposed_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_zoo(tmp_path / "zoo")
    small_config(tmp_path, train={"steps": 2}).save(tmp_path / "mine.yaml")
    folder = rpg.train(str(tmp_path / "mine.yaml"), say=lambda _: None)
    assert rpg.Generator.from_pretrained(folder).config == rpg.Config.load(tmp_path / "mine.yaml")
    assert "training" not in capsys.readouterr().out
    assert rpg.propose(tmp_path / "zoo").config.zoo == rpg.propose(rpg.Zoo.open(tmp_path / "zoo")).config.zoo


def test_collecting_and_training_show_a_bar_in_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setitem(__import__("sys").modules, "ipykernel", rpg)
    monkeypatch.setattr("rpg.console.progress_bar", lambda title: shown.append(title) or progress_bar(title))
    task = {"name": "digits", "network": "mlp-mini", "train_steps": 2, "steps": 2}
    config = {"run": str(tmp_path / "run"), "zoo": str(tmp_path / "digits"), "task": task}
    rpg.Config.parse(config, "test").save(tmp_path / "digits.yaml")
    assert len(rpg.collect(tmp_path / "digits.yaml")) == 2 and shown.pop() == "collecting"
    make_zoo(tmp_path / "zoo")
    rpg.train(small_config(tmp_path, train={"steps": 2}), say=lambda _: None)
    rpg.train(small_config(tmp_path, train={"steps": 2}), overwrite=True, progress=lambda *_: None, say=lambda _: None)
    assert shown == ["training"]


def size(weights: StateDict) -> float:
    return float(sum(value.double().square().sum() for value in weights.values()))


def test_what_a_notebook_shows_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    zoo = make_zoo(tmp_path / "zoo", num=6, num_runs=2)
    assert repr(zoo) == f"Zoo({str(zoo.path)!r}): 6 checkpoints of 2 run(s)"
    proposed = rpg.propose(zoo, overrides=[f"run={tmp_path / 'run'}", "train.steps=2"])
    assert repr(proposed).startswith("# Proposed by rpg inspect for 6 checkpoints of 2 run(s)")
    page = rpg.inspect(zoo)._repr_mimebundle_(include=[], exclude=[])
    assert "checkpoints" in page["text/plain"] and "<pre" in page["text/html"]
    run = rpg.train(proposed.config, say=lambda _: None)
    monkeypatch.setitem(__import__("sys").modules, "ipykernel", rpg)
    monkeypatch.setattr("rpg.console.progress_bar", lambda title: shown.append(title) or progress_bar(title))
    result = rpg.evaluate(run, score=size, num=2, lower=["size"], changes=["evaluate.num_baseline=2"])
    assert shown == ["scoring"] and result.better == {"size": "less"} and result.verdict
    assert {"generated", "original"} <= set(result.to_frame().reset_index()["kind"])
    alone = rpg.evaluate(zoo.path, score=size, changes=["evaluate.num_baseline=2"])
    assert not alone.kinds["generated"].count and alone.mean("original") == result.mean("original")
    with pytest.raises(InputError, match="is a zoo, of which nothing is generated"):
        rpg.evaluate(zoo.path, score=size, num=2)


def test_a_run_works_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    make_zoo(Path("runs/zoos/mine"))
    config = small_config(tmp_path, run="runs/mine", zoo="runs/zoos/mine", train={"steps": 2})
    rpg.train(config, say=lambda _: None)
    assert rpg.Generator.from_pretrained("runs/mine").config.zoo == "runs/zoos/mine"
    monkeypatch.chdir(tmp_path)
    moved = rpg.Generator.from_pretrained("project/runs/mine").config.zoo
    assert Path(moved).samefile(tmp_path / "project" / "runs" / "zoos" / "mine")
    (tmp_path / "project").rename(tmp_path / "moved")
    assert len(rpg.Zoo.open(rpg.Generator.from_pretrained("moved/runs/mine").config.zoo)) == 6


def test_progress_counts_networks(tmp_path: Path) -> None:
    make_zoo(tmp_path / "zoo")
    config = small_config(tmp_path, train={"steps": 2}, generate={"steps": 2, "tile_tokens": 3})
    generator = rpg.Generator.from_pretrained(rpg.train(config, say=lambda _: None))
    assert generator.layout.num_tokens > 3
    told: list[tuple[float, float]] = []
    generator.generate(2, progress=lambda done, total: told.append((done, total)))
    assert {total for _, total in told} == {2} and told[-1][0] == 2 and any(0 < done < 1 for done, _ in told)

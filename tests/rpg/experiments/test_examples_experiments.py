"""The experiments on examples, with networks that hardly learned: every figure is there, and means what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rpg.experiments import by_examples, draws
from rpg.experiments.by_examples import ExampleSets
from rpg.experiments.draws import drawn, log_likelihoods
from rpg.generation.generator import Generator
from rpg.tasks import build_task
from rpg.training.data import zoo_conditions
from tests.reports import checked_report
from tokenization.zoo.zoo import Zoo


def sets_of(run: Path, split: str = "test") -> tuple[Zoo, ExampleSets]:
    config = Generator.from_pretrained(run).config
    zoo = Zoo.open(config.zoo)
    return zoo, ExampleSets(build_task(config.task), zoo_conditions(zoo, zoo.subset("unseen")), split)


def test_examples_are_the_same_with_and_without_labels_and_of_other_images_than_are_scored(example_runs: Path) -> None:
    _, sets = sets_of(example_runs / "examples")
    told, untold = sets.rows(20, True), sets.rows(20, False)
    assert torch.equal(told[..., :64], untold[..., :64]) and not untold[..., 64:74].any()
    assert (told[..., 64:74].sum(1) == 2).all()  # classes take turns
    assert sets.rows(3, True)[..., 64:74].sum() == 3 * len(sets.conditions)


def test_retrieval_finds_the_sensor_that_took_the_images(example_runs: Path) -> None:
    _, sets = sets_of(example_runs / "examples")
    values, _ = sets.shown(20)
    found = log_likelihoods(sets.task, sets.conditions, values, (0.7,))[0]  # [T, T]: each among all
    assert found.argmax(1).tolist() == list(range(len(found)))
    networks = {"w": torch.arange(len(found))[:, None].float()}
    assert drawn(found, networks, 4, 0)["w"].flatten().tolist() == [t for t in range(len(found)) for _ in range(4)]


def test_draws_beside_all_rivals(example_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "SIMULATED", 20)
    monkeypatch.setattr(draws, "SAMPLING_STEPS", (1, 2))
    monkeypatch.setattr(draws, "TUNING", ((2, 1e-3),))
    run = example_runs / "draws"
    report = draws.evaluate_draws(run)
    assert checked_report(run, "draws", "draws") == report and (run / "report.html").is_file()
    wanted = {"generated", "single", "implicit", "retrieved_zoo", "retrieved_simulated", "prior", "original"}
    wanted |= {"generated_by_10_labelled", "single_by_10_labelled"}
    assert "error_by_distance" in report.curves
    for kinds in (report.kinds, report.parts["3 images"]):
        assert set(kinds) == wanted
        assert list(kinds["generated"].joint["joint"]) == [1, 4, 16, 64] and list(kinds["single"].joint["joint"]) == [1]
        assert all(math.isfinite(value) for each in kinds.values() for value in each.metrics["joint"])
    assert len(json.loads((run / "evaluation.json").read_text())["curves"]["Sampling steps"]["lines"]["generated"]) == 2
    alone = draws.evaluate_draws(run, split="validation", compare=False).kinds
    assert set(alone) == {"generated", "generated_by_10_labelled", "original"} and alone["generated"].count == 2


def test_networks_by_examples_beside_what_a_user_would_do(example_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_examples, "PER_CLASS", (1, 2))
    for name, value in {"TUNING": ((0, 1e-3), (2, 1e-3)), "MAP_STEPS": 3, "REPTILE_ROUNDS": 2}.items():
        monkeypatch.setattr(by_examples, name, value)
    report = by_examples.evaluate_by_examples(example_runs / "examples")
    assert set(report.kinds) == {
        "generated", "generated_unlabelled", "best_specialist", "generalist_finetuned", "reptile", "map_in_directions",
        "logistic_regression", "original",
    }  # fmt: skip
    assert checked_report(example_runs / "examples", "examples", "examples") == report
    assert report.curves["Accuracy by examples"].x == (1, 2)
    assert list(report.parts) == ["2 examples a class"]
    generated = report.kinds["generated"]
    assert generated.joint["joint"][1] == pytest.approx(generated.joint["nll"][1])  # of one network they are the same
    assert report.extras["error_by_distance"]["beyond"] + len(report.curves["error_by_distance"].x) <= 3

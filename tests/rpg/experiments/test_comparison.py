"""The configured generator beside kernel ridge: what is compared, on what, and what is written."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from rpg.config import Config
from rpg.experiments import comparison
from rpg.experiments.comparison import Comparison, compare, train_and_compare
from rpg.generation.generator import Generator
from rpg.tasks import DigitsConfig, build_task, collecting
from rpg.tasks.class_splits import all_tasks
from rpg.tasks.images.digits import DigitsSubsetsTask
from tests.conftest import make_zoo, small_config
from tests.rpg.conftest import Run, refused
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo


@pytest.fixture(scope="module")
def subsets(tmp_path_factory):
    """Twenty tasks of digits, of which four are for validation and five unseen."""
    folder = tmp_path_factory.mktemp("subsets")
    task = {
        "name": "digits_subsets", "unseen": {"kind": "random", "num": 5}, "validation": 4, "group": 10,
        "base": {"steps": 60}, "finetune": {"stages": [{"steps": 10}], "batch_size": 32},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DigitsSubsetsTask, "bits", lambda self: all_tasks(10)[:20])
        patch.setattr(collecting, "num_cores", lambda: 1)
        zoo = build_task(task).collect(folder / "zoo")
        yield folder, task, zoo


def of_subsets(subsets, run: Path, **train: object) -> Config:
    folder, task, _ = subsets
    model = {"state": {"of": "none"}, "condition": {"kind": "binary"}}
    return small_config(folder, run=str(run), task=task, model=model, train={"steps": 3} | train)


def quiet(config: Config, **options) -> Comparison:
    _, made = train_and_compare(config, say=lambda _: None, **options)
    assert made is not None
    return made


def test_unseen_tasks_and_test_images_are_never_looked_at(subsets, tmp_path, monkeypatch):
    asked, conditions = set(), []
    real, generate = DigitsSubsetsTask.images, Generator.one_by_one
    monkeypatch.setattr(DigitsSubsetsTask, "images", lambda self, split="test": asked.add(split) or real(self, split))
    monkeypatch.setattr(
        Generator, "one_by_one", lambda self, *a, **o: conditions.append(o["condition"]) or generate(self, *a, **o)
    )
    config, zoo = of_subsets(subsets, tmp_path / "run"), subsets[2]
    made = quiet(config)
    validation = {zoo.entries[index].condition for index in zoo.subset("validation")}
    assert asked == {"validation"} and len(conditions) == 2
    assert all({tuple(row) for row in each.tolist()} == validation for each in conditions)
    assert (made.of, made.num, made.model) == ("validation tasks", 4, "recurrent")
    assert json.loads((tmp_path / "run" / "compare.json").read_text()) == made.model_dump(mode="json")


def test_the_regression_is_better_than_a_generator_that_has_hardly_been_trained(subsets, tmp_path):
    made = quiet(of_subsets(subsets, tmp_path / "run", steps=1, learning_rate=1e-9))
    assert made.difference.mean == pytest.approx(made.configured.mean - made.kernel_ridge.mean)
    assert made.kernel_ridge.mean > 0.7
    rival = Generator.from_pretrained(tmp_path / "run" / "kernel_ridge").config
    assert rival.model.kind == "kernel_ridge" and rival.model.condition.kind == "binary"
    assert rival.generate.temperature == 0 and rival.tokens == of_subsets(subsets, tmp_path).tokens


def test_networks_of_a_single_task_are_compared_on_validation_images(tmp_path, monkeypatch):
    task = DigitsConfig(network="mlp-mini", train_steps=60, steps=6, batch_size=64)
    build_task(task).collect(tmp_path / "zoo")
    asked = []
    predict = type(build_task(task)).predict
    monkeypatch.setattr(
        type(build_task(task)), "predict", lambda self, made, split: asked.append(split) or predict(self, made, split)
    )
    config = small_config(tmp_path, task=task.model_dump(), tokens={"size": 128}, evaluate={"num": 3})
    made = quiet(config)
    assert (made.of, made.num, set(asked)) == ("validation images", 3, {"validation"})
    rival = Generator.from_pretrained(tmp_path / "run" / "kernel_ridge").config
    assert rival.generate.temperature == config.generate.temperature  # without a condition the mean is one network


def test_the_sentence_names_the_better_one():
    def line(configured: list[float], ridge: list[float]) -> str:
        return compare(
            "validation tasks", "recurrent", torch.tensor(configured), torch.tensor(ridge), seed=0
        ).line()  # fmt: skip

    ahead = line([0.9, 0.8], [0.7, 0.6])
    assert ahead.startswith("2 validation tasks: recurrent 85.00%, kernel ridge 65.00%; recurrent is better by 20.00")
    behind = line([0.5, 0.5], [0.6, 0.9])
    assert "kernel ridge is better by 25.00 points (95 % interval 10.00 to 40.00)" in behind
    assert line([0.5, 0.7], [0.7, 0.5]).endswith("neither is better")


def test_the_command_prints_one_line_and_a_stopped_run_compares_nothing(rpg: Run, subsets, tmp_path, monkeypatch):
    of_subsets(subsets, tmp_path / "run").save(tmp_path / "config.yaml")
    code, out, err = rpg("train", tmp_path / "config.yaml", "--compare")
    assert (code, err) == (0, "")
    assert [line for line in out.splitlines() if "4 validation tasks: recurrent" in line] == out.splitlines()[-1:]
    refused(rpg("train", tmp_path / "config.yaml", "--compare"), "--resume")
    real = comparison.train_to_the_end
    stopped_at_once = partial(real, max_seconds=0)
    monkeypatch.setattr(comparison, "train_to_the_end", stopped_at_once)
    config = of_subsets(subsets, tmp_path / "stopped")
    assert train_and_compare(config, say=lambda _: None)[1] is None
    assert not (tmp_path / "stopped" / "compare.json").exists()
    monkeypatch.undo()
    assert quiet(config, resume=True).num == 4


def test_what_cannot_be_compared_is_refused_before_anything_is_trained(subsets, tmp_path):
    folder, task, zoo = subsets
    config = of_subsets(subsets, tmp_path / "run")

    def refusal(config: Config, words: str) -> None:
        with pytest.raises(InputError, match=words):
            train_and_compare(config, say=lambda _: None)
        assert not (tmp_path / "run").exists()

    refusal(of_subsets(subsets, tmp_path / "run", splits=["train", "validation"]), "train.splits")
    plain = {"condition": {"kind": "none"}, "kind": "kernel_ridge"}
    refusal(Config.parse(config.plain() | {"model": plain}, "test"), "model.kind is kernel_ridge")
    refusal(small_config(folder, run=str(tmp_path / "run"), task=task), "model.condition.kind is none")
    make_zoo(tmp_path / "mine")
    refusal(small_config(tmp_path, zoo=str(tmp_path / "mine")), "a task that scores")
    other = Zoo.create(tmp_path / "seen", condition=zoo.condition)
    for index in zoo.subset("train")[:3]:
        other.append(zoo.state_dict(index), run=index, step=0, condition=zoo.entries[index].condition)
    refusal(Config.parse(config.plain() | {"zoo": str(tmp_path / "seen")}, "test"), "no task of split 'validation'")

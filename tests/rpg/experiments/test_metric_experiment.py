"""The experiment on networks of a wished loss, small: it runs, and improves what it is given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rpg.config import Config
from rpg.experiments.driver import experiment_of, run_experiment
from rpg.generation.generator import Generator
from rpg.labs.training_runs import experiment as metric_rivals
from rpg.labs.training_runs.experiment import (
    DRAWS,
    Learned,
    TrainingRuns,
    asked_and_got,
    direction,
    evaluate_metric,
    repeated,
    training_runs_task,
)
from rpg.models.conditioning import InitialConfig
from rpg.tasks.side_by_side import stack
from rpg.training.data import InitialPairs
from rpg.training.loop import train
from tests.reports import checked_report
from tests.rpg.conftest import Run, refused
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("metric")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metric_rivals, "RATES", {"adam": (0.01, 0.03), "sgd": (0.1,)})
        patch.setattr("rpg.labs.training_runs.experiment.RATES", metric_rivals.RATES)
        changes = [
            f"run={folder / 'run'}", f"zoo={folder / 'zoo'}", "task.runs=24", "task.validation=3", "task.unseen=4",
            "task.hidden=8", "task.steps=[0,5,15,60]", "task.group=8", "model.backbone.d_model=32", "train.steps=80",
            "train.ema_decay=0.9", "model.backbone.num_layers=1", "train.batch_size=16", "train.behaviour.images=100",
            "train.warmup_steps=5", "train.behaviour.target=both", "train.behaviour.noise=0.3", "model.initial.own=0.3",
        ]  # fmt: skip
        config = Config.load("configs/gpt.yaml", changes)
        run_experiment(config, experiment_of(config))
        yield folder / "run"


def test_the_experiment_reports_methods_optimizers_and_rounds(run: Path) -> None:
    report = checked_report(run, "target_loss", "target_loss")
    assert report.mean("copy") > 0.99 and report.kinds["original"].extras["direction"]["own_run"] > 0.999
    assert {"generated", "average", "kernel_ridge"} <= report.kinds.keys()
    assert set(report.extras["one_step"]["adam"]) == {str(each) for each in metric_rivals.STEPS}
    assert len(report.extras["recursive"]["stairs"]["loss"]) == 6
    assert report.curves["one generated step beside optimizers"].lines["generated"][0] > 0
    assert (run / "asked_and_got.png").stat().st_size > 10_000
    before = (run / "evaluation.json").read_bytes()
    evaluate_metric(run, split="validation")
    assert (run / "evaluation.json").read_bytes() == before


def test_a_generated_step_from_held_out_first_weights_lowers_the_loss(run: Path) -> None:
    generator = Generator.from_pretrained(run)
    task, zoo = training_runs_task(generator.config), Zoo.open(generator.config.zoo)
    held_out = TrainingRuns.of(zoo, "unseen")
    starts = held_out.space.unflatten(held_out.vectors[:, 0])
    state_dicts = [{name: value[row] for name, value in starts.items()} for row in range(4)]
    made = stack(generator.generate(4, initial=state_dicts, condition=[0.2]))
    assert bool((task.losses(made, "train") < task.losses(starts, "train")).all())


def test_of_several_draws_the_one_of_least_training_loss_is_taken(run: Path) -> None:
    generator = Generator.from_pretrained(run)
    task, zoo = training_runs_task(generator.config), Zoo.open(generator.config.zoo)
    held_out, learned = TrainingRuns.of(zoo, "unseen"), Learned(generator, task, seed=0)
    starts, asked = held_out.space.unflatten(held_out.vectors[:, 0]), torch.tensor([1.0, 0.2, 0.5])
    best = task.losses(learned.best_step(starts, asked), "train")
    draws = learned.step(repeated(starts, DRAWS), asked.repeat(6)[:DRAWS].repeat_interleave(len(best)))
    torch.testing.assert_close(best, task.losses(draws, "train").view(DRAWS, -1).min(0).values)


def test_starts_are_of_the_same_run_and_no_later(run: Path) -> None:
    zoo = Zoo.open(Config.load(run / "config.yaml").zoo)
    indices = zoo.subset("train")
    pairs = InitialPairs(zoo, indices, InitialConfig(first=0.3), seed=0)
    drawn = [(place, pairs.draw(place, number)) for place in range(len(indices)) for number in range(20)]
    entries = [(zoo.entries[indices[place]], zoo.entries[indices[start]]) for place, start in drawn]
    assert all(late.run == early.run and early.step <= late.step for late, early in entries)
    assert {(late.step, early.step) for late, early in entries} >= {(60, 0), (60, 5), (60, 15), (60, 60), (0, 0)}


def test_from_the_command_line(run: Path, rpg: Run, tmp_path: Path) -> None:
    start = next((run.parent / "zoo" / "checkpoints").iterdir())
    options = ("generate", run, "--from", start, "--output", tmp_path)
    code, out, _ = rpg(*options, "--metric", "loss=0.5")
    assert code == 0 and "outside" not in out
    facts = json.loads(Checkpoint.open(tmp_path / "network-00000.safetensors").metadata["rpg.provenance"])
    assert facts["condition"] == [0.5] and len(facts["start"]) == 64
    words = ("export", run, "--to", "torch", "--output", tmp_path / "net.pth", "--from", start)
    assert rpg(*words, "--metric", "loss=0.5")[0] == 0
    exported = torch.load(tmp_path / "net.pth", weights_only=True)
    made = Checkpoint.open(tmp_path / "network-00000.safetensors").state_dict()
    assert exported.keys() == made.keys() and all(torch.equal(exported[name], made[name]) for name in made)
    assert "outside" in rpg("generate", run, "--from", start, "--output", tmp_path / "b", "--metric", "loss=9")[1]
    refused(rpg(*options, "--metric", "accuracy=0.5"), "accuracy", "loss=VALUE")
    refused(rpg(*options, "--metric", "loss=low"), "loss=VALUE")
    refused(rpg(*options, "--metric", "loss=0"), "logarithm")
    refused(rpg(*options), "condition")
    refused(rpg("generate", run, "--metric", "loss=0.5"), "--from")
    refused(rpg("generate", run, "--metric", "loss=0.5", "--from", run / "none.safetensors"), "none.safetensors")
    refused(rpg("metric", "configs/digits.yaml"), "training_runs")


def test_a_metric_works_without_a_start(run: Path, tmp_path: Path) -> None:
    config = Config.load(run / "config.yaml", ["model.initial=null", f"run={tmp_path / 'run'}", "train.steps=3"])
    generator = Generator.from_pretrained(train(config))
    assert len(generator.generate(2, condition=[0.5])) == 2
    with pytest.raises(InputError, match="without initial weights"):
        generator.generate(1, condition=[0.5], initial={})
    with pytest.raises(InputError, match="train.behaviour.target: base has no use with a metric"):
        train(Config.load(run / "config.yaml", ["train.behaviour.target=base", f"run={tmp_path / 'base'}"]))
    accuracy = ["model.condition.name=accuracy", "model.condition.scale=linear"]
    config = Config.load(run / "config.yaml", [*accuracy, f"run={tmp_path / 'other'}"])
    with pytest.raises(InputError, match="train.behaviour"):
        train(config)


def test_measures_of_what_came() -> None:
    asked, rng = torch.logspace(-2, 0, 40), torch.Generator().manual_seed(0)
    metrics = {"loss": 2 * asked, "test_loss": asked.flip(0), "test_accuracy": asked}
    found = asked_and_got(asked, metrics)
    assert found["spearman"] == pytest.approx(1) and found["test_spearman"] == pytest.approx(-1)
    assert found["factor"] == pytest.approx(2)
    starts, trained = torch.randn(2, 6, 500, generator=rng)
    cosines = direction(starts + 0.5 * (trained - starts), trained, starts)
    assert cosines["own_run"] == pytest.approx(1) and cosines["other_run"] < 0.7

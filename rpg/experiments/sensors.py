"""The experiment on sensors: collect, train, generate for unseen sensors, compare, report.

T sensors, C settings, F features, S seen sensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rpg.config import Config, EvaluateConfig
from rpg.evaluation.conditional import Regression, regression_grid, tune
from rpg.evaluation.page.page import Page
from rpg.evaluation.report import Curve, Report
from rpg.evaluation.starts import best_of, fine_tuning, reptile
from rpg.evaluation.two_sample import sets_of_networks
from rpg.experiments.by_examples import error_by_distance, evaluate_by_examples
from rpg.experiments.draws import evaluate_draws
from rpg.experiments.driver import Experiment
from rpg.experiments.evaluating import judges
from rpg.experiments.single import generate_for, stacked_networks, tasks_scored, train_or_continue
from rpg.generation.generator import Generator
from rpg.seeding import make_rng
from rpg.tasks import require_task
from rpg.tasks.collecting import BASE
from rpg.tasks.sensors.task import SensorsTask, informed_probabilities, train_informed
from rpg.tasks.side_by_side import Stacked, repeat
from rpg.training.data import zoo_conditions
from tokenization.zoo.zoo import Zoo

LARGE = (128, 128)
"""Hidden widths of the network that takes settings as inputs and need not fit on a sensor."""

ALONE = {"compare": False}
"""Options of evaluating the generators of further seeds, whose rivals are the same."""

NOTHING_TRAINED = EvaluateConfig(informed=0, fine_tuning=(), meta_learning=0)

ANGLES = 24
"""Points of the curve over the angle."""


def experiment(config: Config) -> Experiment:
    """What `rpg run` does: networks by settings, by examples, or draws where there is a prior."""
    if config.model.condition.kind != "examples":
        asked = "--setting angle=137 --setting inverted=true"
        asked = '--prompt "upside down"' if config.model.condition.kind == "text" else asked
        then = f"rpg generate {{run}} {asked} --output mine"
        return Experiment("sensors", evaluate_sensors, then=then, further=ALONE)
    name, evaluate = (
        ("draws", evaluate_draws) if config.model.state.of != "none" else ("examples", evaluate_by_examples)
    )
    return Experiment(name, evaluate, train_or_continue, "rpg generate {run} --examples FOLDER --num 16", ALONE)


@judges
def evaluate_sensors(
    generator: Generator, zoo: Zoo, *, run: Path, seed: int, split: str, compare: bool = True
) -> tuple[Report, Page]:
    """Generate a network for every unseen sensor and compare.

    Args:
        split: images to score on; ``validation`` scores on validation sensors.
        compare: whether rivals that have to be trained for a while are compared, too.

    Raises:
        InputError: the run is not one of sensors.
    """
    task, sensors = task_of_sensors(generator.config), tasks_scored(split)
    evaluate = generator.config.evaluate if compare else NOTHING_TRAINED
    settings, known = (zoo_conditions(zoo, zoo.subset(each)) for each in (sensors, "train"))
    seen, base = stacked_networks(zoo, zoo.subset("train")), load_file(zoo.path / BASE)
    regression, ridge = tuned_regression(task, zoo, seen)

    def generate(settings: Tensor, wordings: str = split) -> Stacked:
        return generate_for(generator, requests_of(generator, settings, seed, wordings), seed)

    started = time.perf_counter()
    made = {"generated": generate(settings)}
    seconds = (time.perf_counter() - started) / len(settings)
    asked: dict[str, Any] = {"by": "settings"}
    if isinstance(requests := requests_of(generator, settings, seed, split), list):
        made["taught_wordings"] = generate(settings, "train")
        asked = {"by": "words", "words": requests[:5]}
    made |= {"original": stacked_networks(zoo, zoo.subset(sensors)), "kernel_ridge": ridge(settings)}
    made |= simple_baselines(task, base, known, seen, settings)
    answers = {name: task.probabilities(each, settings, split) for name, each in made.items()}  # [T, B, K]
    informed, notes = _informed(task, settings, split, evaluate.informed)
    targets = task.classes(split).expand(len(settings), -1)
    kinds = {
        name: sets_of_networks(each[:, None], targets, seed=seed, conditions=settings)
        for name, each in {**answers, **informed}.items()
    }
    curves, facts = {}, {"training_seconds": generator.facts.get("training seconds"), "seconds_per_network": seconds}
    facts |= {
        "seen_sensors": len(known), "kernel_ridge": {"length": regression.parameter, "penalty": regression.penalty}
    }  # fmt: skip
    if any(setting.name == "angle" for setting in task.settings):
        curves["accuracy_by_angle"] = _by_angle(task, base, generate, ridge, split)
    if evaluate.fine_tuning:
        curves["as_a_start"], facts["fine-tuning milliseconds a step"] = _starts(
            evaluate, task, known, seen, made, settings, split, seed
        )
    errors = 1 - torch.tensor(kinds["generated"].metrics["accuracy"])
    calibration, extras = error_by_distance(generator, requests, errors)
    report = Report(
        experiment="sensors", judge=f"{len(settings)} {sensors} sensors", split=split, seed=seed,
        better={"accuracy": "more", "joint": "less"}, kinds=kinds,
        references=("original", "large_with_settings", "taught_wordings"),
        asked={**asked, "settings": {each.name: [each.low, each.high] for each in task.settings}},
        curves={**curves, **calibration}, extras=extras, facts=facts, notes=notes,
    )  # fmt: skip
    shown = {name.replace("_", " "): str(value) for name, value in facts.items()}
    return report, Page(f"Networks for sensors that nobody calibrated: {run.name}", shown)


def simple_baselines(
    task: SensorsTask, base: dict[str, Tensor], known: Tensor, seen: Stacked, settings: Tensor
) -> dict[str, Stacked]:
    """Networks for sensors ``[T, C]``: the nearest and average of those ``seen`` for ``known`` ones, and the base."""
    asked, there = (task.condition.inputs(each) for each in (settings, known))
    nearest = torch.cdist(asked, there).argmin(1)
    return {
        "nearest_seen": {name: value[nearest] for name, value in seen.items()},
        "generalist": repeat(base, len(settings)),
        "average": repeat({name: value.mean(0) for name, value in seen.items()}, len(settings)),
    }


def task_of_sensors(config: Config) -> SensorsTask:
    """The task of a configuration. Raises InputError if it is not ``sensors``."""
    return require_task(config.task, SensorsTask, "but this is the experiment on sensors; see configs/sensors.yaml")


def requests_of(generator: Generator, settings: Tensor, seed: int, wordings: str) -> Tensor | list[str]:
    """What a generator is asked for sensors ``[T, C]``: their settings, or words in the wordings of a split."""
    if not generator.config.model.condition.phrases:
        return settings
    return task_of_sensors(generator.config).describe(settings, make_rng(seed, "wordings"), wordings)


def _informed(
    task: SensorsTask, settings: Tensor, split: str, num_steps: int
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Answers ``[T, B, K]`` of networks that take the settings as inputs, and what they mean for generation."""
    if not num_steps:
        return {}, ()
    answers = {}
    for name, widths in {"settings_as_inputs": (task.config.hidden,), "large_with_settings": LARGE}.items():
        network = train_informed(task, widths, num_steps)
        answers[name] = informed_probabilities(task, network, settings, split)
    right = (answers[name].argmax(-1) == task.classes(split)).double().mean()
    small = sum(value.numel() for value in task.build().state_dict().values())
    return answers, (
        f"One network of {network.num_values:,} values that takes the settings as inputs reaches {right:.1%}: "
        f"generation is for targets that must be small, here {small:,} values.",
    )


def tuned_regression(task: SensorsTask, zoo: Zoo, seen: Stacked) -> tuple[Regression, Callable[[Tensor], Stacked]]:
    """Kernel ridge from settings to weights, tuned on the validation sensors' accuracy, and what it predicts."""
    known, validation = (zoo_conditions(zoo, zoo.subset(each)) for each in ("train", "validation"))

    def predicted(regression: Regression, settings: Tensor) -> Stacked:
        # features in -1 … 1 as `Regression` takes conditions, in 0 … 1
        shares = regression.mixture(*((task.condition.inputs(each) + 1) / 2 for each in (known, settings)))
        return {name: torch.tensordot(shares.to(value.dtype), value, 1) for name, value in seen.items()}

    def score(regression: Regression) -> float:
        return task.accuracies(predicted(regression, validation), validation, "validation").mean().item()

    chosen, _ = tune(regression_grid()["kernel_ridge"], score)
    return chosen, lambda settings: predicted(chosen, settings)


def _by_angle(
    task: SensorsTask, base: dict[str, Tensor], generate: Callable[[Tensor], Stacked],
    ridge: Callable[[Tensor], Stacked], split: str,
) -> Curve:  # fmt: skip
    """Accuracy of sensors that differ in their angle alone."""
    place = next(i for i, setting in enumerate(task.settings) if setting.name == "angle")
    setting = task.settings[place]
    default = torch.tensor([[each.default for each in task.settings]])
    settings = default.repeat(ANGLES + 1, 1)
    settings[:, place] = torch.linspace(setting.low, setting.high, ANGLES + 1)
    upright = task.train_specialists(base, default)
    made = {
        "generated": generate(settings),
        "trained_upright": {name: value.expand(len(settings), *value.shape[1:]) for name, value in upright.items()},
        "generalist": repeat(base, len(settings)),
        "kernel_ridge": ridge(settings),
    }
    lines = {name: tuple(task.accuracies(each, settings, split).tolist()) for name, each in made.items()}
    return Curve(
        x=tuple(settings[:, place].tolist()), lines=lines, across="angle of the sensor (degrees)", up="accuracy"
    )


def _starts(
    evaluate: EvaluateConfig, task: SensorsTask, known: Tensor, seen: Stacked, made: dict[str, Stacked],
    settings: Tensor, split: str, seed: int,
) -> tuple[Curve, float]:  # fmt: skip
    """Accuracy of networks that are fine-tuned, by start, and what a step of one network takes among all of them."""
    best = best_of(task, seen, settings, seed=seed)
    untrained = task.build().state_dict()
    starts = {
        "generated": made["generated"],
        "best_specialist": {name: value[best] for name, value in seen.items()},
        "generalist": made["generalist"],
        "random": repeat(untrained, len(settings)),
    }
    if evaluate.meta_learning:
        learned = reptile(task, untrained, known, evaluate.meta_learning, seed=seed)
        starts["reptile"] = repeat(learned, len(settings))
    began = time.process_time()
    found = fine_tuning(task, starts, settings, evaluate.fine_tuning, split=split, seed=seed)
    milliseconds = 1000 * (time.process_time() - began)
    lines = {name: tuple(each.mean(1).tolist()) for name, each in found.items()}
    steps = tuple(float(mark) + 1 for mark in evaluate.fine_tuning)
    curve = Curve(x=steps, lines=lines, across="fine-tuning steps + 1", up="accuracy", log=True)
    return curve, milliseconds / (max(1, max(evaluate.fine_tuning)) * len(starts) * len(settings))

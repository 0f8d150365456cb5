"""The experiment on networks of a wished loss: trajectories, training, comparison with optimizers, pictures.

T networks, A asked losses, P values of a network.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from rpg.config import Config
from rpg.console import FiguresTable
from rpg.evaluation.page.page import Page, write_report
from rpg.evaluation.report import Curve, Report, networks
from rpg.evaluation.wish_plots import plot_wishes
from rpg.evaluation.wishes import asked_and_got, direction
from rpg.experiments.single import collect, existing, require_for_choices
from rpg.generation.generator import Generator
from rpg.labs.training_runs.rivals import RATES, Trajectories, repeated, trivial, tuned_training
from rpg.labs.training_runs.task import TrajectoriesTask
from rpg.tasks import build_task
from rpg.tasks.collecting import single_threaded
from rpg.tasks.side_by_side import Stacked, stack, unstack
from rpg.training.loop import train_to_the_end
from tokenization.errors import InputError
from tokenization.zoo.locks import locks
from tokenization.zoo.zoo import Zoo

NUM_ASKED = 20
"""Losses that are asked for, at even distances on the scale."""

ROUNDS = 5
"""Times that a generated network becomes the next start."""


@locks(lambda config, **_: config.run)
def run_metric(config: Config, *, progress: dict[str, Callable[..., None]]) -> dict[str, Any]:
    """Collect the trajectories, train the generator, compare and draw.

    Args:
        config: the experiment.
        progress: callbacks named ``collect`` (done, total) and ``train`` (done, total, loss); ``watch``, as
            `rpg.training.loop.train` takes it.

    Returns:
        What ``<run>/evaluation.json`` holds.
    """
    trajectories_task(config)
    started = time.perf_counter()
    collect(config, progress=progress.get("collect"))
    collected = time.perf_counter() - started
    train_to_the_end(config, overwrite=True, progress=progress.get("train"), watch=progress.get("watch"))
    return evaluate_metric(config.run, seed=config.seed, seconds={"collect_seconds": collected, "started": started})


def trajectories_task(config: Config) -> TrajectoriesTask:
    """The task of a configuration. Raises InputError if it is another, or the generator takes no loss and start."""
    task = build_task(config.task) if config.task is not None else None
    if not isinstance(task, TrajectoriesTask):
        name = config.task.name if config.task is not None else "none"
        raise InputError(f"task.name is {name}, but this experiment is on whole runs; set task.name to trajectories")
    if config.model.condition.name != "loss" or config.model.start is None:
        raise InputError(
            "this experiment asks for the loss of networks that go on from a start; set model.condition to "
            "{kind: metric, name: loss} and model.start to {}"
        )
    require_for_choices(config)  # the asked loss and the optimizers' rates are chosen
    return task


@dataclass(frozen=True)
class Learned:
    """A generator as an optimizer.

    Attributes:
        generator: takes a loss and a start.
        task: builds and scores networks.
        seed: of what is generated.
    """

    generator: Generator
    task: TrajectoriesTask
    seed: int

    def step(self, starts: Stacked, asked: Tensor) -> Stacked:
        """Networks from starts and losses ``[T]``, one generated step."""
        made = self.generator.generate(
            len(asked), seed=self.seed, start=unstack(starts), condition=asked[:, None].double()
        )
        return stack(made)  # type: ignore[arg-type]

    def scores(self, weights: Stacked, tested: str) -> dict[str, Tensor]:
        """Loss and accuracy on training images, and on those of the split ``tested`` under the name of test."""
        return {**self.task.metrics(weights, "train"), **self.task.metrics(weights, tested, "test_")}


@single_threaded()
@locks(lambda run, split="unseen", **_: None if split == "validation" else existing(run))
def evaluate_metric(
    run: Path | str, *, split: str = "unseen", seed: int = 0, seconds: dict[str, float] | None = None
) -> dict[str, Any]:
    """Ask for losses from held-out first weights, and compare with what is trivial and with training.

    Args:
        run: a run folder.
        split: runs to start from; ``validation`` is scored on validation images, to choose by, and writes nothing.
        seed: decides what is generated.
        seconds: of the collection, and when it started.
    """
    run = Path(run)
    generator = Generator.from_pretrained(run)
    task, zoo, scale = trajectories_task(generator.config), Zoo.open(generator.config.zoo), generator.metric
    assert scale is not None
    learned, tested = Learned(generator, task, seed), "validation" if split == "validation" else "test"
    trained, held_out = Trajectories.of(zoo, "train"), Trajectories.of(zoo, split)
    levels = torch.from_numpy(np.geomspace(scale.low, scale.high, NUM_ASKED)).float()
    num = len(held_out.vectors)
    starts = held_out.space.unflatten(held_out.vectors[:, 0])
    asked = levels.repeat_interleave(num)
    made = {"generated": learned.step(repeated(starts, len(levels)), asked)}
    begun = held_out.vectors[:, 0].repeat(len(levels), 1)
    made |= {name: held_out.space.unflatten(vectors) for name, vectors in trivial(trained, begun, asked, scale).items()}
    own = torch.cat([held_out.nearest(float(level)) for level in levels])
    made["own_training"] = held_out.space.unflatten(own)
    report: dict[str, Any] = {}
    for name, weights in made.items():
        report[name] = asked_and_got(asked, learned.scores(weights, tested))
        moved = asked < 0.9 * held_out.losses[:, 0].min()  # what asks for the start's own loss has no direction
        report[name]["direction"] = direction(held_out.space.flatten(weights)[moved], own[moved], begun[moved])
    chosen = _choose_level(learned, zoo, levels)
    report["one_step"] = _one_step(learned, zoo, starts, chosen, tested)
    report["recursive"] = _recursive(learned, starts, levels, chosen, tested)
    report["num"] = num
    if split == "validation":
        return report
    report["training_seconds"] = generator.facts.get("training seconds")
    plot_wishes(report, asked, learned.scores(made["generated"], tested)["loss"], run / "wishes.png")
    if seconds:
        report["collect_seconds"] = seconds["collect_seconds"]
        report["seconds"] = time.perf_counter() - seconds["started"]
    page = Page(f"Networks with a target loss: {run.name}", pictures={"Asked and got": run / "wishes.png"})
    write_report(run, report_of(report, split, seed), page)
    return report


def judge(run: Path | str, *, split: str = "unseen", seed: int = 0) -> Report:
    """The report of a run, as `evaluate_metric` finds it."""
    return report_of(evaluate_metric(run, split=split, seed=seed), split, seed)


def report_of(found: dict[str, Any], split: str, seed: int) -> Report:
    """What was found of every method in the form that all evaluations share; own training is the original."""
    names = [name for name, each in found.items() if isinstance(each, dict) and "spearman" in each]
    kinds, measured = {}, ("spearman", "test_spearman", "factor")
    for name in names:
        extras = {"direction": found[name]["direction"], "by_asked": found[name]["by_asked"]}
        kind = networks({each: [found[name][each]] for each in measured}, count=found["num"], extras=extras)
        kinds[{"own_training": "original"}.get(name, name)] = kind
    asked = tuple(found["generated"]["by_asked"]["asked"])
    lines = {name: tuple(found[name]["by_asked"]["test_loss"]) for name in names}
    got = Curve(x=asked, lines=lines, across="asked loss", up="loss on test images", log=True)
    return Report(
        experiment="target_loss", judge=f"from {found['num']} held-out first weights", split=split, seed=seed,
        better={"spearman": "more", "test_spearman": "more", "factor": "less"}, kinds=kinds,
        asked={"loss": list(asked)}, curves={"asked and got": got},
        facts={name: value for name, value in found.items() if name.endswith("seconds")},
        extras={name: found[name] for name in ("one_step", "recursive")},
    )  # fmt: skip


def _choose_level(learned: Learned, zoo: Zoo, levels: Tensor) -> float:
    """The asked loss whose networks are the best on validation images, from the first weights of validation runs."""
    runs = Trajectories.of(zoo, "validation")
    starts = runs.space.unflatten(runs.vectors[:, 0])
    made = learned.step(repeated(starts, len(levels)), levels.repeat_interleave(len(runs.vectors)))
    losses = learned.task.metrics(made, "validation")["loss"].view(len(levels), -1).mean(1)
    return levels[losses.argmin()].item()


def _one_step(learned: Learned, zoo: Zoo, starts: Stacked, level: float, tested: str) -> dict[str, Any]:
    """One generated step beside so many of Adam and of gradient descent, all tuned on validation runs and images."""
    made = learned.step(starts, torch.full((len(starts["bias"]),), level))
    report: dict[str, Any] = {"asked": level, "generated": _means(learned.scores(made, tested))}
    runs = Trajectories.of(zoo, "validation")
    choosing = runs.space.unflatten(runs.vectors[:, 0])
    for optimizer in RATES:
        found = tuned_training(learned.task, optimizer, choosing, starts)
        report[optimizer] = {
            str(steps): {"learning_rate": rate, **_means(learned.scores(weights, tested))}
            for steps, (rate, weights) in found.items()
        }
    for name in ("test_loss", "test_accuracy"):
        sign = 1 if name == "test_loss" else -1
        equal = [int(s) for s, each in report["adam"].items() if sign * each[name] <= sign * report["generated"][name]]
        report[f"adam_steps_to_equal_{name}"] = min(equal, default=None)
    return report


def _recursive(learned: Learned, starts: Stacked, levels: Tensor, level: float, tested: str) -> dict[str, Any]:
    """Each generated network is the next start: asked for the same again and again, or for less every time."""
    num = len(starts["bias"])
    stairs = np.geomspace(float(levels.max()), level, ROUNDS + 1)[1:].tolist()
    report: dict[str, Any] = {}
    for name, asked in (("same", [level] * ROUNDS), ("stairs", stairs)):
        weights, rounds = starts, [_means(learned.scores(starts, tested))]
        for each in asked:
            weights = learned.step(weights, torch.full((num,), each))
            rounds.append(_means(learned.scores(weights, tested)))
        report[name] = {"asked": asked} | {key: [each[key] for each in rounds] for key in rounds[0]}
    return report


def _means(scores: dict[str, Tensor]) -> dict[str, float]:
    return {name: values.double().mean().item() for name, values in scores.items()}


def print_metric(report: dict[str, Any], console: Console) -> None:
    """Asked and got by method, and one generated step beside training."""
    heads = ("networks", "rank correlation", "off by a factor of", "on test images", "along own training", "another's")
    table = []
    for name, found in report.items():
        if isinstance(found, dict) and "spearman" in found:
            cells = (found["spearman"], found["factor"], found["test_spearman"], *found["direction"].values())
            table.append([name.replace("_", " "), *(f"{each:.3f}" for each in cells)])
    console.print(FiguresTable(heads, table, f"asked and got, from {report['num']} held-out first weights"))
    step = report["one_step"]
    table = []
    rows = [("generated", "1", step["generated"])]
    rows += [(name, steps, each) for name in RATES for steps, each in step[name].items()]
    for name, steps, each in rows:
        rate = f"{each['learning_rate']:g}" if "learning_rate" in each else f"asked {step['asked']:.3f}"
        figures = (f"{each['loss']:.3f}", f"{each['test_loss']:.3f}", f"{each['test_accuracy']:.2%}")
        table.append([name, steps, rate, *figures])
    heads = ("optimizer", "steps", "rate", "loss", "test loss", "test accuracy")
    console.print(FiguresTable(heads, table, "from first weights"))

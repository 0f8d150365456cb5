"""The experiment on networks with a target loss: a generator, compared with simple baselines and with optimizers.

T networks, A asked losses, P values of a network.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from rpg.config import Config
from rpg.evaluation.page.page import Page, PageTable
from rpg.evaluation.report import Curve, Report, networks
from rpg.evaluation.span import FlatSpace
from rpg.experiments.driver import Experiment
from rpg.experiments.evaluating import judges
from rpg.experiments.single import generate_for, require_for_choices, stacked_networks, tasks_scored
from rpg.generation.generator import Generator
from rpg.labs.training_runs.task import TrainingRunsTask
from rpg.models.kernel_regression import KernelRidge
from rpg.seeding import make_rng
from rpg.tasks import require_task
from rpg.tasks.side_by_side import Stacked, join_stacked, unstack
from tokenization.errors import InputError
from tokenization.zoo.metric import MetricScale
from tokenization.zoo.zoo import Zoo

RATES = {
    "adam": (3e-3, 5e-3, 7e-3, 1e-2, 1.4e-2, 2e-2, 3e-2, 5e-2, 0.1),
    "sgd": (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5),
}
"""Learning rates that are tried; gradient descent has the zoo's momentum."""

STEPS = (1, 2, 5, 10, 20, 35, 50, 70, 100)

MOST_REGRESSED = 1500
"""Pairs that kernel ridge is fitted to."""


@dataclass(frozen=True)
class TrainingRuns:
    """The checkpoints of some runs.

    Attributes:
        vectors: ``[R, S, P]``, of R runs at S steps.
        losses: ``[R, S]`` on training images.
        space: between vectors and networks.
    """

    vectors: Tensor
    losses: Tensor
    space: FlatSpace

    @property
    def starts(self) -> Stacked:
        """The first weights of the runs."""
        return self.space.unflatten(self.vectors[:, 0])

    @classmethod
    def of(cls, zoo: Zoo, split: str) -> TrainingRuns:
        """Those of a split's runs, all of which have the same steps."""
        chosen = sorted(zoo.subset(split), key=lambda index: (zoo.entries[index].run, zoo.entries[index].step))
        networks, num = stacked_networks(zoo, chosen), len({zoo.entries[index].run for index in chosen})
        losses = torch.tensor([zoo.entries[index].metrics["loss"] for index in chosen])
        space = FlatSpace(networks)
        return cls(space.flatten(networks).unflatten(0, (num, -1)), losses.view(num, -1), space)

    def nearest(self, loss: float) -> Tensor:
        """Of every run the checkpoint whose loss is nearest to ``loss``, by its logarithm: ``[R, P]``."""
        places = (self.losses.log() - torch.tensor(loss).log()).abs().argmin(1)
        return self.vectors[torch.arange(len(places)), places]


def simple_baselines(trained: TrainingRuns, starts: Tensor, asked: Tensor, scale: MetricScale) -> dict[str, Tensor]:
    """Networks that need no generator, for starts ``[T, P]`` and asked losses ``[T]``; ``[T, P]`` each.

    ``average``: of all runs at that loss; ``copy``: the training checkpoint whose loss is nearest; ``kernel_ridge``:
    the difference from the start by regression on the start's values and the asked loss.
    """
    average, copy = torch.empty_like(starts), torch.empty_like(starts)
    flat, losses = trained.vectors.flatten(0, 1), trained.losses.flatten()
    for value in asked.unique():
        rows = asked == value
        average[rows] = trained.nearest(float(value)).mean(0)
        copy[rows] = flat[(losses.log() - value.log()).abs().argmin()]
    return {"average": average, "copy": copy, "kernel_ridge": _regressed(trained, starts, asked, scale)}


def _regressed(trained: TrainingRuns, starts: Tensor, asked: Tensor, scale: MetricScale) -> Tensor:
    firsts = trained.vectors[:, 0]
    mean, spread = firsts.mean(0), (firsts - firsts.mean(0)).square().sum(1).mean().sqrt()

    def inputs(start: Tensor, loss: Tensor) -> Tensor:
        return torch.cat([(start - mean) / spread, scale.scaled(loss)[:, None]], 1)

    rng, (num_runs, num_steps) = make_rng("kernel ridge"), trained.losses.shape
    chosen = torch.randperm(num_runs * (num_steps - 1), generator=rng)[:MOST_REGRESSED]
    run, step = chosen // (num_steps - 1), chosen % (num_steps - 1) + 1
    changes = (trained.vectors[run, step] - firsts[run]).double()
    regression = KernelRidge.fit(inputs(firsts[run], trained.losses[run, step]), changes @ changes.T)
    return starts + (regression.shares(inputs(starts, asked)) @ changes).float()


def tuned_training(
    task: TrainingRunsTask, optimizer: str, choosing: Stacked, starts: Stacked
) -> dict[int, tuple[float, Stacked]]:
    """Networks and learning rate after each number of steps, at the rate that is best on validation images.

    The rate is chosen from the starts ``choosing``, for every number of steps anew.
    """
    best: dict[int, tuple[float, float]] = {}
    for rate in RATES[optimizer]:
        for step, weights in task.train(choosing, optimizer, rate, STEPS).items():
            loss = task.metrics(weights, "validation")["loss"].mean().item()
            best[step] = min(best.get(step, (float("inf"), rate)), (loss, rate))
    found: dict[int, tuple[float, Stacked]] = {}
    for rate in {rate for _, rate in best.values()}:
        wanted = [step for step in STEPS if best[step][1] == rate]
        found |= {step: (rate, weights) for step, weights in task.train(starts, optimizer, rate, wanted).items()}
    return dict(sorted(found.items()))


def repeated(stacked: Stacked, num: int) -> Stacked:
    """All networks ``num`` times, one after the other."""
    return join_stacked([stacked] * num)


NUM_ASKED = 20
"""Losses that are asked for, at even distances on the scale."""

BETTER: dict[str, Literal["more", "less"]] = {"spearman": "more", "test_spearman": "more", "factor": "less"}

ROUNDS = 5
"""Times that a generated network becomes the next start."""

DRAWS = 16
"""Networks drawn from one start, of which the one of least loss on training images is taken."""


def experiment(config: Config) -> Experiment:
    """What `rpg run` does with a configuration. Raises InputError if its generator takes no loss and start."""
    training_runs_task(config)
    return Experiment("target_loss", evaluate_metric, then="rpg generate {run} --from START --metric loss=0.1")


def training_runs_task(config: Config) -> TrainingRunsTask:
    """The task of a configuration. Raises InputError if it is another, or the generator takes no loss and start."""
    cure = "but this experiment is on whole runs; set task.name to training_runs"
    task = require_task(config.task, TrainingRunsTask, cure)
    if config.model.condition.name != "loss" or config.model.initial is None:
        raise InputError(
            "this experiment asks for the loss of networks that go on from a start; set model.condition to "
            "{kind: metric, name: loss} and model.initial to {}"
        )
    require_for_choices(config)  # the asked loss and the optimizers' rates are chosen
    return task


@dataclass(frozen=True)
class Learned:
    """A generator that takes a loss and a start, as an optimizer; ``seed`` is that of generation."""

    generator: Generator
    task: TrainingRunsTask
    seed: int

    def step(self, starts: Stacked, asked: Tensor) -> Stacked:
        """Networks from starts and losses ``[T]``, one generated step."""
        return generate_for(self.generator, asked[:, None].double(), self.seed, initial=unstack(starts))

    def best_step(self, starts: Stacked, asked: Tensor) -> Stacked:
        """The same of losses ``[A]``: of `DRAWS` networks of each start the one of least loss on training images."""
        num = len(starts["bias"])
        each = asked.repeat(-(-DRAWS // len(asked)))[:DRAWS]
        made = self.step(repeated(starts, DRAWS), each.repeat_interleave(num))
        best = self.task.losses(made, "train").view(DRAWS, num).argmin(0)
        return {name: value.unflatten(0, (DRAWS, num))[best, torch.arange(num)] for name, value in made.items()}

    def scores(self, weights: Stacked, tested: str) -> dict[str, Tensor]:
        """Loss and accuracy on training images, and on those of the split ``tested`` under the name of test."""
        return {**self.task.metrics(weights, "train"), **self.task.metrics(weights, tested, "test_")}


@judges
def evaluate_metric(generator: Generator, zoo: Zoo, *, run: Path, seed: int, split: str) -> tuple[Report, Page]:
    """Ask for losses from held-out first weights, and compare with simple baselines and with training.

    The networks that training made of the same first weights are the report's originals.
    """
    learned, scale = Learned(generator, training_runs_task(generator.config), seed), generator.metric
    assert scale is not None
    trained, held_out = TrainingRuns.of(zoo, "train"), TrainingRuns.of(zoo, tasks_scored(split))
    levels = torch.from_numpy(np.geomspace(scale.low, scale.high, NUM_ASKED)).float()
    num, starts = len(held_out.vectors), held_out.starts
    asked = levels.repeat_interleave(num)
    made = {"generated": learned.step(repeated(starts, len(levels)), asked)}
    begun = held_out.vectors[:, 0].repeat(len(levels), 1)
    own = torch.cat([held_out.nearest(float(level)) for level in levels])
    others = {**simple_baselines(trained, begun, asked, scale), "original": own}
    made |= {name: held_out.space.unflatten(vectors) for name, vectors in others.items()}
    kinds, lines = {}, {}
    for name, weights in made.items():
        found = asked_and_got(asked, learned.scores(weights, split))
        moved = asked < 0.9 * held_out.losses[:, 0].min()  # what asks for the start's own loss has no direction
        towards = direction(held_out.space.flatten(weights)[moved], own[moved], begun[moved])
        lines[name] = tuple(found["by_asked"]["test_loss"])
        kinds[name] = networks(
            {metric: [found[metric]] for metric in BETTER}, count=len(asked),
            extras={"direction": towards, "by_asked": found["by_asked"]},
        )  # fmt: skip
    runs = TrainingRuns.of(zoo, "validation")
    chosen = _choose_level(learned, runs.starts, levels)
    one_step = _one_step(learned, trained, runs.starts, starts, levels, chosen, split)
    recursive = _recursive(learned, starts, levels, chosen, split)
    report = Report(
        experiment="target_loss", judge=f"from {num} held-out first weights", split=split, seed=seed, better=BETTER,
        kinds=kinds, asked={"loss": levels.tolist()}, curves=_curves(levels.tolist(), lines, one_step, recursive),
        facts={"training_seconds": generator.facts.get("training seconds")},
        extras={"one_step": one_step, "recursive": recursive},
    )  # fmt: skip
    return report, Page(f"Networks with a target loss: {run.name}", tables=[_optimizers(one_step)])


def _curves(
    asked: list[float], lines: dict[str, Any], one_step: dict[str, Any], recursive: dict[str, Any]
) -> dict[str, Curve]:
    up, rounds = "loss on test images", tuple(map(float, range(ROUNDS + 1)))
    steps = tuple(map(float, STEPS))
    trained = {name: tuple(each["test_loss"] for each in one_step[name].values()) for name in RATES}
    trained["generated"] = (one_step["generated"]["test_loss"],) + (None,) * (len(STEPS) - 1)
    again = {f"asked for {name}": tuple(recursive[name]["test_loss"]) for name in recursive}
    return {
        "asked and got": Curve(x=tuple(asked), lines=lines, across="asked loss", up=up, log=True),
        "one generated step beside optimizers": Curve(x=steps, lines=trained, across="steps", up=up, log=True),
        "a generated network as the next start": Curve(x=rounds, lines=again, across="generated steps", up=up),
    }


def _choose_level(learned: Learned, starts: Stacked, levels: Tensor) -> float:
    """The asked loss whose networks are the best on validation images, from the first weights of validation runs."""
    made = learned.step(repeated(starts, len(levels)), levels.repeat_interleave(len(starts["bias"])))
    losses = learned.task.metrics(made, "validation")["loss"].view(len(levels), -1).mean(1)
    return levels[losses.argmin()].item()


def _one_step(
    learned: Learned, trained: TrainingRuns, choosing: Stacked, starts: Stacked, levels: Tensor, level: float,
    tested: str,
) -> dict[str, Any]:  # fmt: skip
    """One generated step beside so many of Adam and of gradient descent, tuned on validation images from ``choosing``.

    ``level`` of ``levels`` is asked for; of several draws those below it, too. ``average`` is that of the training
    runs' checkpoints of this loss.
    """
    asked, began = torch.full((len(starts["bias"]),), level), time.process_time()
    made = learned.step(starts, asked)
    seconds = time.process_time() - began
    report: dict[str, Any] = {"asked": level, "generated": _means(learned.scores(made, tested))}
    best = learned.best_step(starts, levels[levels <= level][-DRAWS:])
    report[f"best_of_{DRAWS}"] = _means(learned.scores(best, tested))
    average = trained.space.unflatten(trained.nearest(level).mean(0, keepdim=True))
    report["average"] = _means(learned.scores(average, tested))
    for optimizer in RATES:
        found = tuned_training(learned.task, optimizer, choosing, starts)
        report[optimizer] = {
            str(steps): {"learning_rate": rate, **_means(learned.scores(weights, tested))}
            for steps, (rate, weights) in found.items()
        }
    began = time.process_time()
    learned.task.train(starts, "adam", RATES["adam"][0], [10])
    report["adam_steps_of_same_seconds"] = 10 * seconds / (time.process_time() - began)
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


def _optimizers(step: dict[str, Any]) -> PageTable:
    """One generated step beside training."""
    table, best = [], f"best of {DRAWS} by training loss"
    rows = [("generated", "1", step["generated"]), (best, "1", step[f"best_of_{DRAWS}"])]
    rows.append(("average of runs", "0", step["average"]))
    rows += [(name, steps, each) for name in RATES for steps, each in step[name].items()]
    for name, steps, each in rows:
        rate = f"{each['learning_rate']:g}" if "learning_rate" in each else f"asked {step['asked']:.3f}"
        metrics = (f"{each['loss']:.3f}", f"{each['test_loss']:.3f}", f"{each['test_accuracy']:.2%}")
        table.append([name, steps, rate, *metrics])
    heads = ("optimizer", "steps", "rate", "loss", "test loss", "test accuracy")
    return PageTable("Optimizers from first weights", heads, table)


def asked_and_got(asked: Tensor, metrics: Mapping[str, Tensor]) -> dict[str, Any]:
    """How networks' losses follow those asked for ``[T]``.

    ``metrics`` are ``loss`` on training images, ``test_loss`` and ``test_accuracy``, ``[T]`` each. Returns ``spearman``
    (rank correlation of asked and got) and ``factor`` (the median of the larger by the smaller) on training images,
    ``test_spearman``, and ``by_asked``: the means at every asked loss.
    """
    got, values = metrics["loss"], asked.unique()
    found: dict[str, Any] = {
        "spearman": rank_correlation(asked, got),
        "test_spearman": rank_correlation(asked, metrics["test_loss"]),
        "factor": (asked.log() - got.log()).abs().median().exp().item(),
    }
    rows = [asked == value for value in values]
    found["by_asked"] = {"asked": values.tolist()} | {
        name: [each[row].double().mean().item() for row in rows] for name, each in metrics.items()
    }
    return found


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's, of ``[T]`` and ``[T]``; 0 where one of them is constant."""
    if len(first.unique()) == 1 or len(second.unique()) == 1:
        return 0.0
    return float(spearmanr(first.numpy(), second.numpy()).statistic)


def direction(made: Tensor, trained: Tensor, starts: Tensor) -> dict[str, float]:
    """The mean cosine of the steps from ``starts`` to what is ``made`` and to what is ``trained``, ``[T, P]`` each.

    ``own_run``: with the start's own run; ``other_run``: with another's, which tells nothing of the start.
    """
    changed, wanted = made - starts, trained - starts

    def cosine(other: Tensor) -> float:
        return torch.cosine_similarity(changed, other, dim=1).mean().item()

    return {"own_run": cosine(wanted), "other_run": cosine(wanted.roll(1, 0))}

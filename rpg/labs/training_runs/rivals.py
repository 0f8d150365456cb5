"""What generated networks with a target loss are compared with: copies, averages, regression, and training itself.

T networks, P values of a network, A asked losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rpg.evaluation.span import FlatSpace
from rpg.labs.training_runs.task import TrainingRunsTask
from rpg.models.kernel_regression import KernelRidge
from rpg.seeding import make_rng
from rpg.tasks.side_by_side import Stacked, join_stacked, stack
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

    @classmethod
    def of(cls, zoo: Zoo, split: str) -> TrainingRuns:
        """Those of a split's runs."""
        runs: dict[int, list[int]] = {}
        for index in sorted(zoo.subset(split), key=lambda each: zoo.entries[each].step):
            runs.setdefault(zoo.entries[index].run, []).append(index)
        space = FlatSpace(stack([zoo.state_dict(zoo.subset(split)[0])]))
        vectors = [space.flatten(stack([zoo.state_dict(index) for index in each])) for each in runs.values()]
        losses = [[zoo.entries[index].metrics["loss"] for index in each] for each in runs.values()]
        return cls(torch.stack(vectors), torch.tensor(losses), space)

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
    task: TrainingRunsTask, optimizer: str, choosing: Stacked, starts: Stacked, steps: Sequence[int] = STEPS
) -> dict[int, tuple[float, Stacked]]:
    """Tuned training: networks after each number of steps, at the rate that is best on validation images.

    Args:
        task: trains.
        optimizer: ``adam`` or ``sgd``.
        choosing: starts by which the rate is chosen, for every number of steps anew.
        starts: those to report on.
        steps: numbers of steps.

    Returns:
        Rate and networks by number of steps.
    """
    best: dict[int, tuple[float, float]] = {}
    for rate in RATES[optimizer]:
        for step, weights in task.train(choosing, optimizer, rate, steps).items():
            loss = task.metrics(weights, "validation")["loss"].mean().item()
            best[step] = min(best.get(step, (float("inf"), rate)), (loss, rate))
    found: dict[int, tuple[float, Stacked]] = {}
    for rate in {rate for _, rate in best.values()}:
        wanted = [step for step in steps if best[step][1] == rate]
        found |= {step: (rate, weights) for step, weights in task.train(starts, optimizer, rate, wanted).items()}
    return dict(sorted(found.items()))


def repeated(stacked: Stacked, num: int) -> Stacked:
    """All networks ``num`` times, one after the other."""
    return join_stacked([stacked] * num)

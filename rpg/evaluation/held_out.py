"""Generated networks for tasks nobody trained, beside everything that is trivial.

It works on bits, stacked weights and a task that scores them; it knows no generator. T tasks, C classes, P values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rpg.evaluation.metrics import Summary, summarize
from rpg.evaluation.regression import Regression, regression_grid, tune
from rpg.evaluation.vectors import FlatSpace
from rpg.section import Section
from rpg.seeding import generator
from rpg.tasks.class_splits import hamming_to_nearest
from rpg.tasks.side_by_side import Stacked

NUM_WORST = 5


class AccuracyTask(Protocol):
    """What gives stacked networks one figure each, by which regressions are chosen."""

    def accuracies(self, weights: Stacked, bits: Tensor, split: str) -> Tensor:
        """Share of right answers of each network at its task, ``[T]``."""


class ScoringTask(AccuracyTask, Protocol):
    """What scores stacked networks at their tasks."""

    def targets(self, conditions: Tensor, split: str) -> Tensor:
        """Right answers ``[T, images]``."""

    def classes(self, split: str) -> Tensor:
        """Classes of the images ``[images]``."""


@dataclass(frozen=True)
class TaskNetworks:
    """One network for each of some tasks.

    Attributes:
        bits: ``[T, C]``.
        weights: stacked, ``[T, *shape]``.
    """

    bits: Tensor
    weights: Stacked

    def select(self, rows: Tensor) -> TaskNetworks:
        """Some of them, in the order of ``rows``."""
        return TaskNetworks(self.bits[rows], {name: value[rows] for name, value in self.weights.items()})


class MethodScores(Section):
    """Accuracy of one method on some tasks, each task's in the order of ``tasks``."""

    accuracy: Summary
    accuracies: tuple[float, ...]


class WorstTask(Section):
    """A task at which generated networks do badly: share of right answers for each class of images."""

    bits: tuple[int, ...]
    accuracy: float
    accuracy_of_class: tuple[float, ...]


class SplitScores(Section):
    """All methods on the tasks of one split."""

    tasks: tuple[tuple[int, ...], ...]
    hamming_to_seen: tuple[int, ...]
    methods: dict[str, MethodScores]
    worst: tuple[WorstTask, ...]
    beats_kernel_ridge: float
    not_worse_than_kernel_ridge: float


def choose_regressions(
    task: AccuracyTask, train: TaskNetworks, validation: TaskNetworks
) -> dict[str, tuple[Regression, float]]:
    """Each kind of regression, tuned, with its validation accuracy; ``ridge`` is the best degree.

    Candidates are fitted on ``train`` alone and chosen by the validation tasks' accuracy on validation images.
    """
    space = FlatSpace(train.weights)
    vectors = space.flatten(train.weights)

    def score(predicted: Tensor) -> float:
        return task.accuracies(space.unflatten(predicted), validation.bits, "validation").mean().item()

    chosen = {
        name: tune(regressions, train.bits, vectors, validation.bits, score)
        for name, regressions in regression_grid().items()
    }
    chosen["ridge"] = max((chosen[f"ridge_degree_{degree}"] for degree in (1, 2, 3)), key=lambda each: each[1])
    return chosen


def trivial_networks(
    seen: TaskNetworks, bits: Tensor, regressions: Mapping[str, Regression], own: bool
) -> dict[str, Stacked]:
    """The networks that need no generator, for the tasks ``bits`` ``[T, C]``: stacked weights by method.

    Args:
        seen: all seen tasks.
        bits: the tasks to make networks for.
        regressions: by the name they are reported under; fitted on ``seen`` here.
        own: the tasks are seen ones: the nearest seen task is then the nearest *other*.
    """
    space = FlatSpace(seen.weights)
    vectors = space.flatten(seen.weights)
    made: dict[str, Stacked] = {
        "nearest_seen": seen.select(nearest_rows(bits, seen.bits, own)).weights,
        "average": space.unflatten(vectors.mean(0).expand(len(bits), -1)),
    }
    for name, each in regressions.items():
        made[name] = space.unflatten(each.predict(seen.bits, vectors, bits))
    return made


def nearest_rows(bits: Tensor, seen: Tensor, own: bool) -> Tensor:
    """The nearest seen task of each, by Hamming distance; with ``own`` the nearest that is not the task itself."""
    distance = (bits[:, None] != seen[None]).sum(-1)
    if own:
        distance[distance == 0] = seen.shape[1] + 1
    return distance.argmin(1)


def score_split(
    task: ScoringTask,
    networks: Mapping[str, Stacked],
    bits: Tensor,
    seen: Tensor,
    probabilities: Tensor,
    split: str = "test",
    seed: int = 0,
) -> SplitScores:
    """Score every method on the tasks ``bits`` ``[T, C]``.

    Args:
        task: scores.
        networks: stacked weights by method; ``generated`` and ``kernel_ridge`` among them.
        bits: the tasks.
        seen: bits of the seen tasks, for the distance to the nearest.
        probabilities: of the shared base network on the images, ``[images, C]``.
        split: images.
        seed: of the bootstrap.
    """
    accuracies = {name: task.accuracies(weights, bits, split) for name, weights in networks.items()}
    accuracies["base_summed"] = base_summed(task, probabilities, bits, split)
    difference = accuracies["generated"] - accuracies["kernel_ridge"]
    return SplitScores(
        tasks=tuple(tuple(row) for row in bits.tolist()),
        hamming_to_seen=tuple(hamming_to_nearest(bits, seen)[0].tolist()),
        methods={
            name: MethodScores(accuracy=summarize(values, seed), accuracies=tuple(values.tolist()))
            for name, values in accuracies.items()
        },
        worst=_worst(task, networks["generated"], bits, accuracies["generated"], split),
        beats_kernel_ridge=(difference > 0).double().mean().item(),
        not_worse_than_kernel_ridge=(difference >= 0).double().mean().item(),
    )


def base_summed(task: ScoringTask, probabilities: Tensor, bits: Tensor, split: str) -> Tensor:
    """Accuracy ``[T]`` of the shared base network whose class probabilities are summed over each side of a task."""
    positive = bits.to(probabilities.dtype) @ probabilities.T  # [T, images]
    return ((positive > 0.5) == task.targets(bits, split).bool()).double().mean(1)


def random_other(bits: Tensor, seen: Tensor, seed: int) -> Tensor:
    """For each task the bits of a random seen task: what a generator is asked that is not told the task."""
    stream = generator(seed, "no condition")
    return seen[torch.randint(len(seen), (len(bits),), generator=stream)]


def _worst(task: Any, weights: Stacked, bits: Tensor, accuracies: Tensor, split: str) -> tuple[WorstTask, ...]:
    rows = accuracies.argsort()[:NUM_WORST]
    chosen = {name: value[rows] for name, value in weights.items()}
    answers = task.probabilities(chosen, split).argmax(-1)  # [W, images]
    right = (answers == task.targets(bits[rows], split)).double()
    classes = task.classes(split)
    shares = torch.stack([right[:, classes == each].mean(1) for each in range(bits.shape[1])], 1)  # [W, C]
    return tuple(
        WorstTask(bits=tuple(bits[row].tolist()), accuracy=accuracies[row].item(), accuracy_of_class=tuple(share))
        for row, share in zip(rows.tolist(), shares.tolist(), strict=True)
    )


class Diversity(Section):
    """Several networks generated for one task: what sampling adds."""

    num_tasks: int
    networks_per_task: int
    disagreement: float
    mean_accuracy: float
    ensemble_accuracy: float
    weight_spread: float


def measure_diversity(
    task: Any, draws: list[Stacked], bits: Tensor, originals_spread: float, split: str = "test"
) -> Diversity:
    """How several networks for one task differ, and what their vote gains.

    Args:
        task: scores.
        draws: R stacked weights, each of the same T tasks.
        bits: the tasks ``[T, C]``.
        originals_spread: root mean square deviation of the seen tasks' weights from their mean, to compare with.
        split: images.
    """
    probabilities = torch.stack([task.probabilities(each, split) for each in draws])  # [R, T, images, 2]
    answers = probabilities.argmax(-1)
    targets = task.targets(bits, split)
    pairs = [(a, b) for a in range(len(draws)) for b in range(a)]
    space = FlatSpace(draws[0])
    vectors = torch.stack([space.flatten(each) for each in draws])  # [R, T, P]
    return Diversity(
        num_tasks=len(bits),
        networks_per_task=len(draws),
        disagreement=sum((answers[a] != answers[b]).double().mean().item() for a, b in pairs) / len(pairs),
        mean_accuracy=(answers == targets).double().mean().item(),
        ensemble_accuracy=(probabilities.mean(0).argmax(-1) == targets).double().mean().item(),
        weight_spread=vectors.std(0).square().mean().sqrt().item() / originals_spread,
    )

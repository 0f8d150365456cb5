"""Generated networks for tasks nobody trained, beside everything that is trivial.

It works on bits, stacked weights and a family of tasks that scores them; it knows no generator.
T tasks, C classes, P values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rpg.evaluation.metrics import summarize
from rpg.evaluation.regression import Regression, regression_grid, tune
from rpg.evaluation.vectors import FlatSpace
from rpg.section import Section
from rpg.seeding import make_rng
from rpg.tasks.base import ImageTaskFamily, TaskFamily
from rpg.tasks.class_splits import hamming_to_nearest
from rpg.tasks.side_by_side import Stacked

NUM_WORST = 5


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


def choose_regressions(
    task: TaskFamily, train: TaskNetworks, validation: TaskNetworks
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


def held_out_baselines(
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


@dataclass(frozen=True)
class SplitScores:
    """All methods on the tasks of one split.

    Attributes:
        bits: the tasks ``[T, C]``.
        hamming_to_seen: distance to the nearest seen task ``[T]``.
        figures: by method, ``generated`` and ``kernel_ridge`` among them, and name, ``[T]`` each; the first of a
            method's figures is what methods are compared by.
    """

    bits: Tensor
    hamming_to_seen: Tensor
    figures: dict[str, Mapping[str, Tensor]]

    def first(self, method: str) -> Tensor:
        """The first figure of a method, ``[T]``."""
        return next(iter(self.figures[method].values()))

    def methods(self, seed: int) -> dict[str, Any]:
        """By method a summary of each figure over tasks, and every task's; ``seed`` is the bootstrap's."""
        found: dict[str, Any] = {}
        for method, figures in self.figures.items():
            summaries = {name: summarize(values, seed).model_dump(mode="json") for name, values in figures.items()}
            each = {name: values.tolist() for name, values in figures.items()}
            alone = {"accuracies": each["accuracy"]} if list(each) == ["accuracy"] else {"each": each}
            found[method] = summaries | alone
        return found

    def tasks(self) -> dict[str, Any]:
        """What the tasks are, and on which share of them generated networks are better than those of a method."""
        difference = {name: self.first("generated") - self.first(name) for name in self.figures if name != "generated"}
        return {
            "tasks": self.bits.tolist(),
            "hamming_to_seen": self.hamming_to_seen.tolist(),
            "better_than": {name: (each > 0).double().mean().item() for name, each in difference.items()},
            "beats_kernel_ridge": (difference["kernel_ridge"] > 0).double().mean().item(),
            "not_worse_than_kernel_ridge": (difference["kernel_ridge"] >= 0).double().mean().item(),
        }


def score_split(
    task: TaskFamily, networks: Mapping[str, Stacked], bits: Tensor, seen: Tensor, split: str = "test"
) -> SplitScores:
    """Score every method on the tasks ``bits`` ``[T, C]``.

    Args:
        task: scores.
        networks: stacked weights by method; ``generated`` and ``kernel_ridge`` among them.
        bits: the tasks.
        seen: bits of the seen tasks, for the distance to the nearest.
        split: images or rows.
    """
    figures = {name: task.scores(weights, bits, split) for name, weights in networks.items()}
    return SplitScores(bits, hamming_to_nearest(bits, seen)[0], figures)


def base_summed(task: ImageTaskFamily, probabilities: Tensor, bits: Tensor, split: str) -> Tensor:
    """Accuracy ``[T]`` of the shared base network whose class probabilities are summed over each side of a task."""
    positive = bits.to(probabilities.dtype) @ probabilities.T  # [T, images]
    return ((positive > 0.5) == task.targets(bits, split).bool()).double().mean(1)


def random_other(bits: Tensor, seen: Tensor, seed: int) -> Tensor:
    """For each task the bits of a random seen task: what a generator is asked that is not told the task."""
    rng = make_rng(seed, "no condition")
    return seen[torch.randint(len(seen), (len(bits),), generator=rng)]


def worst_tasks(
    task: ImageTaskFamily, weights: Stacked, bits: Tensor, accuracies: Tensor, split: str
) -> list[dict[str, Any]]:
    """The tasks at which networks do worst: bits, accuracy, and the share of right answers for each class of images."""
    rows = accuracies.argsort()[:NUM_WORST]
    chosen = {name: value[rows] for name, value in weights.items()}
    answers = task.probabilities(chosen, split).argmax(-1)  # [W, images]
    right = (answers == task.targets(bits[rows], split)).double()
    classes = task.classes(split)
    shares = torch.stack([right[:, classes == each].mean(1) for each in range(bits.shape[1])], 1)  # [W, C]
    return [
        {"bits": bits[row].tolist(), "accuracy": accuracies[row].item(), "accuracy_of_class": share}
        for row, share in zip(rows.tolist(), shares.tolist(), strict=True)
    ]


class Diversity(Section):
    """Several networks generated for one task: what sampling adds."""

    num_tasks: int
    networks_per_task: int
    disagreement: float
    mean_accuracy: float
    ensemble_accuracy: float
    weight_spread: float


def measure_diversity(
    task: ImageTaskFamily, draws: list[Stacked], bits: Tensor, originals_spread: float, split: str = "test"
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

"""Scores of generated networks for unseen tasks, beside simple baselines.

It works on bits, stacked weights and a family of tasks that scores them; it knows no generator.
T tasks, C classes, P values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rpg.evaluation.report import Networks, networks
from rpg.evaluation.task_networks import Parts
from rpg.evaluation.workers import Workers
from rpg.tasks.base import ImageTaskFamily, TaskFamily
from rpg.tasks.class_splits import hamming_to_nearest
from tokenization.checkpoint.progress import steps

NUM_WORST = 5

METHODS = ("original", "generated", "kernel_ridge")
"""Those of which more than metrics is kept."""


@dataclass(frozen=True)
class MethodScores:
    """The scores of one method's networks.

    Attributes:
        metrics: by name, ``[T]`` each; the first is what methods are compared by.
        probabilities: ``[T, images, 2]``, if they were asked for.
    """

    metrics: Mapping[str, Tensor]
    probabilities: Tensor | None = None

    @property
    def first(self) -> Tensor:
        """``[T]``."""
        return next(iter(self.metrics.values()))


def score_method(
    task: TaskFamily, networks: Parts, bits: Tensor, split: str = "test", keep: bool = False
) -> MethodScores:
    """Score one method's networks, a part at a time.

    Args:
        task: scores.
        networks: for the tasks, in their order.
        bits: the tasks ``[T, C]``.
        split: images or rows.
        keep: probabilities of image tasks.
    """
    metrics: list[Mapping[str, Tensor]] = []
    probabilities = []
    done = 0
    for part in networks:
        rows = bits[done : done + len(next(iter(part.values())))]
        done += len(rows)
        if not isinstance(task, ImageTaskFamily):
            metrics.append(task.scores(part, rows, split))
            continue
        found = task.probabilities(part, split)
        right = found.argmax(-1) == task.targets(rows, split)
        metrics.append({"accuracy": right.double().mean(1)})
        if keep:
            probabilities.append(found)
    joined = {name: torch.cat([each[name] for each in metrics]) for name in metrics[0]}
    return MethodScores(joined, torch.cat(probabilities) if probabilities else None)


@dataclass(frozen=True)
class SplitScores:
    """All methods on the tasks of one split.

    Attributes:
        bits: the tasks ``[T, C]``.
        hamming_to_seen: distance to the nearest seen task ``[T]``.
        metrics: by method, ``generated`` and ``kernel_ridge`` among them, and name, ``[T]`` each; the first of a
            method's metrics is what methods are compared by.
        probabilities: of ``METHODS``, of image tasks, ``[T, images, 2]``.
    """

    bits: Tensor
    hamming_to_seen: Tensor
    metrics: dict[str, Mapping[str, Tensor]]
    probabilities: dict[str, Tensor]

    def first(self, method: str) -> Tensor:
        """The first metric of a method, ``[T]``."""
        return next(iter(self.metrics[method].values()))

    def kinds(self, seed: int) -> dict[str, Networks]:
        """Every method as a kind of networks; ``generated_better`` is the share of tasks on which it is beaten."""
        found, own = {}, self.first("generated")
        for method, metrics in self.metrics.items():
            better = {"generated_better": (own > self.first(method)).double().mean().item()}
            found[method] = networks(
                metrics, distances={"hamming": self.hamming_to_seen}, conditions=self.bits, seed=seed,
                extras={} if method == "generated" else better,
            )  # fmt: skip
        return found


def score_split(
    task: TaskFamily,
    networks: Mapping[str, Parts],
    bits: Tensor,
    seen: Tensor,
    split: str = "test",
    workers: Workers | None = None,
    rows: Sequence[int] | None = None,
) -> SplitScores:
    """Score every method on the tasks ``bits`` ``[T, C]``, one after the other.

    Args:
        task: scores.
        networks: by method; ``generated`` and ``kernel_ridge`` among them.
        bits: the tasks.
        seen: bits of the seen tasks, for the distance to the nearest.
        split: images or rows.
        workers: the processes that share the tasks; this one alone when None.
        rows: the tasks that ``networks`` are for, those of this process; all when None.
    """
    workers, rows = workers or Workers(), range(len(bits)) if rows is None else rows
    own = bits[list(rows)]
    named = steps("scoring tasks", list(networks), after=0)
    scores = {name: score_method(task, networks[name], own, split, name in METHODS) for name in named}
    found = workers.collect(rows, [_row(scores, number) for number in range(len(rows))], len(bits))
    metrics: dict[str, Mapping[str, Tensor]] = {}
    kept: dict[str, Tensor] = {}
    for name, (first, held) in found[0].items():
        every = [row[name][0] for row in found]
        metrics[name] = {each: torch.stack([metric[each] for metric in every]) for each in first}
        if held is not None:
            kept[name] = torch.stack([row[name][1] for row in found])
    return SplitScores(bits, hamming_to_nearest(bits, seen)[0], metrics, kept)


def _row(scores: Mapping[str, MethodScores], number: int) -> dict[str, tuple[dict[str, Tensor], Any]]:
    """One task's metrics and kept probabilities, by method."""
    return {
        name: (
            {metric: values[number].clone() for metric, values in each.metrics.items()},
            None if each.probabilities is None else each.probabilities[number].clone(),
        )
        for name, each in scores.items()
    }


def base_summed(task: ImageTaskFamily, probabilities: Tensor, bits: Tensor, split: str) -> Tensor:
    """Accuracy ``[T]`` of the shared base network whose class probabilities are summed over each side of a task."""
    positive = bits.to(probabilities.dtype) @ probabilities.T  # [T, images]
    return ((positive > 0.5) == task.targets(bits, split).bool()).double().mean(1)


def worst_tasks(task: ImageTaskFamily, probabilities: Tensor, bits: Tensor, split: str) -> list[dict[str, Any]]:
    """The tasks at which networks do worst: bits, accuracy, and the share of right answers for each class of images.

    Args:
        task: knows the right answers.
        probabilities: of one network for each task, ``[T, images, 2]``.
        bits: the tasks ``[T, C]``.
        split: images.
    """
    right = (probabilities.argmax(-1) == task.targets(bits, split)).double()  # [T, images]
    accuracies = right.mean(1)
    rows = accuracies.argsort()[:NUM_WORST]
    classes = task.classes(split)
    shares = torch.stack([right[rows][:, classes == each].mean(1) for each in range(bits.shape[1])], 1)  # [W, C]
    return [
        {"bits": bits[row].tolist(), "accuracy": accuracies[row].item(), "accuracy_of_class": share}
        for row, share in zip(rows.tolist(), shares.tolist(), strict=True)
    ]

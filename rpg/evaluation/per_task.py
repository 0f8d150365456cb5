"""Several networks for one task, beside several originals of that task: do they differ as much, and in the same way?

T tasks, R networks of each, B images.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from rpg.evaluation.metrics import Summary, summarize
from rpg.evaluation.novelty import distances
from rpg.evaluation.similarity import error_iou
from rpg.evaluation.two_sample import coverage, function_vectors, nearest_neighbour_accuracy
from rpg.section import Section
from rpg.tasks.base import ImageTaskFamily


class TaskSamples(Section):
    """The networks of one method."""

    error_iou: float = Field(description="overlap of the wrong answers of two networks for one task, mean")
    accuracy: Summary = Field(description="over all networks")
    nearest_neighbour_accuracy: float | None = Field(
        description="1-NNA of a task's networks beside its originals, in class probabilities, mean; 0.5 is perfect"
    )
    coverage: float | None = Field(
        None, description="share of a task's originals that are the nearest of one of its networks, mean"
    )
    nearest: float | None = Field(
        None, description="distance in class probabilities to the nearest original of the task, mean"
    )


class PerTask(Section):
    """Several networks for each of some tasks, by method; the original networks among them."""

    num_tasks: int
    networks_per_task: int
    methods: dict[str, TaskSamples]


def rows_of_tasks(bits: Tensor) -> Tensor | None:
    """The rows of each task that has several: ``[T·R, C]`` in any order → ``[T, R]``, or None if there is none.

    R is the least that a task has of those with two or more.
    """
    _, task, counts = bits.unique(dim=0, return_inverse=True, return_counts=True)
    several = (counts > 1).nonzero()[:, 0].tolist()
    if not several:
        return None
    least = int(counts[several].min())
    return torch.stack([(task == each).nonzero()[:least, 0] for each in several])


def measure_per_task(
    task: ImageTaskFamily, probabilities: Mapping[str, Tensor], bits: Tensor, split: str = "test", seed: int = 0
) -> PerTask | None:
    """Compare a task's networks with its originals.

    Args:
        task: knows the right answers.
        probabilities: by method ``[N, B, 2]``, of networks aligned with ``bits``; ``original`` among them.
        bits: of each network's task, ``[N, C]``.
        split: images.
        seed: of the bootstrap.

    Returns:
        None where no task has several originals.
    """
    rows = rows_of_tasks(bits)
    if rows is None:
        return None
    targets = task.targets(bits[rows[:, 0]], split)  # [T, B]
    of_tasks = {name: each[rows] for name, each in probabilities.items()}  # [T, R, B, 2]
    return PerTask(
        num_tasks=len(rows),
        networks_per_task=rows.shape[1],
        methods={
            name: _samples(each, of_tasks["original"] if name != "original" else None, targets, seed)
            for name, each in of_tasks.items()
        },
    )


def _samples(probabilities: Tensor, originals: Tensor | None, targets: Tensor, seed: int) -> TaskSamples:
    answers = probabilities.argmax(-1)  # [T, R, B]
    accuracies = (answers == targets[:, None]).double().mean(-1)  # [T, R]
    overlaps = torch.stack([_mean_overlap(own, right) for own, right in zip(answers, targets, strict=True)])
    beside: dict[str, float] = {}
    if originals is not None:
        pairs = zip(map(function_vectors, probabilities), map(function_vectors, originals), strict=True)
        found = [_beside(made, own) for made, own in pairs]
        beside = {name: sum(each[name] for each in found) / len(found) for name in found[0]}
    return TaskSamples(
        error_iou=overlaps.mean().item(),
        accuracy=summarize(accuracies.flatten(), seed),
        nearest_neighbour_accuracy=beside.pop("nearest_neighbour_accuracy", None),
        **beside,
    )


def _beside(made: Tensor, originals: Tensor) -> dict[str, float]:
    """How vectors ``[R, F]`` of a task's networks lie beside those of its originals ``[R, F]``."""
    between = distances(made, originals)
    return {
        "nearest_neighbour_accuracy": nearest_neighbour_accuracy(
            distances(made, made), distances(originals, originals), between
        ),
        "coverage": coverage(between),
        "nearest": between.amin(1).mean().item(),
    }


def _mean_overlap(answers: Tensor, targets: Tensor) -> Tensor:
    """Mean error IoU of two different networks of one task: ``[R, B]``, ``[B]``."""
    overlap = error_iou(answers, answers, targets)
    num = len(answers)
    return (overlap.sum() - overlap.diagonal().sum()) / (num * (num - 1))

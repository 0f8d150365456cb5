"""Several networks for one task beside several originals of it: do they differ as much, and in the same way?

T tasks, R networks or draws of each, C classes, B images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from rpg.evaluation.ensembles import sets_of_networks
from rpg.evaluation.report import Summary, summarize
from rpg.evaluation.task_networks import Parts
from rpg.evaluation.two_sample import coverage, distances, error_iou, function_vectors, nearest_neighbour_accuracy
from rpg.evaluation.workers import Workers
from rpg.section import Section
from rpg.tasks.base import ImageTaskFamily
from tokenization.checkpoint.progress import steps


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


def scores_of_sets(
    task: ImageTaskFamily, probabilities: Mapping[str, Tensor], bits: Tensor, split: str = "test"
) -> dict[str, dict[str, dict[int, float]]]:
    """How well a task's networks answer together: by method, `Networks.joint` of sets of one and of all R.

    The arguments are those of `measure_per_task`; where no task has several originals, R is 1.
    """
    rows = rows_of_tasks(bits)
    rows = torch.arange(len(bits))[:, None] if rows is None else rows
    targets = task.targets(bits[rows[:, 0]], split)  # [T, B]
    return {name: sets_of_networks(each[rows], targets).joint for name, each in probabilities.items()}


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


class Diversity(Section):
    """Several networks generated for one task: what sampling adds."""

    num_tasks: int
    networks_per_task: int
    disagreement: float
    mean_accuracy: float
    ensemble_accuracy: float
    weight_spread: float


def measure_diversity(
    task: ImageTaskFamily,
    draws: Sequence[Parts],
    bits: Tensor,
    originals_spread: float,
    split: str = "test",
    workers: Workers | None = None,
    rows: Sequence[int] | None = None,
) -> Diversity:
    """How several networks for one task differ, and what their vote gains.

    Args:
        task: scores.
        draws: R times networks for the same T tasks, in the same parts.
        bits: the tasks ``[T, C]``.
        originals_spread: root mean square deviation of the seen tasks' weights from their mean, to compare with.
        split: images.
        workers: the processes that share the tasks; this one alone when None.
        rows: the tasks that ``draws`` are for, those of this process; all when None.
    """
    workers, rows = workers or Workers(), range(len(bits)) if rows is None else rows
    own: list[tuple[Tensor, float, int]] = []
    for parts in steps("generating several networks a task", zip(*draws, strict=True)):
        made = torch.stack([task.probabilities(each, split) for each in parts])
        for number in range(made.shape[1]):
            deviations = [torch.stack([each[name][number] for each in parts]).double().std(0) for name in parts[0]]
            square = sum(each.square().sum().item() for each in deviations)
            own.append((made[:, number].clone(), square, sum(each.numel() for each in deviations)))
    every, all_squares, counts = zip(*workers.collect(rows, own, len(bits)), strict=True)
    squares, count = sum(all_squares), sum(counts)
    probabilities = torch.stack(every, 1)  # [R, T, images, 2]
    answers = probabilities.argmax(-1)
    targets = task.targets(bits, split)
    pairs = [(a, b) for a in range(len(draws)) for b in range(a)]
    return Diversity(
        num_tasks=len(bits),
        networks_per_task=len(draws),
        disagreement=sum((answers[a] != answers[b]).double().mean().item() for a, b in pairs) / len(pairs),
        mean_accuracy=(answers == targets).double().mean().item(),
        ensemble_accuracy=(probabilities.mean(0).argmax(-1) == targets).double().mean().item(),
        weight_spread=(squares / count) ** 0.5 / originals_spread,
    )

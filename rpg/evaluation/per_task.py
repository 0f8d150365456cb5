"""Several networks for one task beside several originals of it, and the tasks at which networks do worst.

It works on bits, answers and a family of tasks; it knows no generator.
T tasks, R networks or draws of each, C classes, B images, P values."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rpg.evaluation.engine import Workers
from rpg.evaluation.report import summarize
from rpg.evaluation.task_networks import Parts
from rpg.evaluation.two_sample import (
    coverage,
    distances,
    error_iou,
    function_vectors,
    nearest_neighbour_accuracy,
    sets_of_networks,
)
from rpg.tasks.base import ImageTaskFamily
from tokenization.checkpoint.progress import steps


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
) -> dict[str, Any] | None:
    """Compare a task's networks with its originals.

    Args:
        probabilities: by method ``[N, B, 2]``, of networks aligned with ``bits``; ``original`` among them.
        bits: of each network's task, ``[N, C]``.

    Returns:
        ``num_tasks``, ``networks_per_task``, and of each of ``methods``, as means over tasks, ``error_iou`` (overlap
        of the wrong answers of two networks for one task), ``accuracy`` (its summary over all networks), and of all but
        originals the figures of `beside_originals`. None where no task has several originals.
    """
    rows = rows_of_tasks(bits)
    if rows is None:
        return None
    targets = task.targets(bits[rows[:, 0]], split)  # [T, B]
    originals = list(map(function_vectors, probabilities["original"][rows]))
    methods: dict[str, dict[str, Any]] = {}
    for name, each in probabilities.items():
        answers = each[rows].argmax(-1)  # [T, R, B]
        overlaps = torch.stack([_mean_overlap(own, right) for own, right in zip(answers, targets, strict=True)])
        accuracies = (answers == targets[:, None]).double().mean(-1)  # [T, R]
        made = map(function_vectors, each[rows])
        found = [beside_originals(*pair) for pair in zip(made, originals, strict=True)]
        methods[name] = {
            "error_iou": overlaps.mean().item(),
            "accuracy": summarize(accuracies.flatten(), seed).model_dump(mode="json"),
            **{key: None if name == "original" else statistics.fmean(f[key] for f in found) for key in found[0]},
        }
    return {"num_tasks": len(rows), "networks_per_task": rows.shape[1], "methods": methods}


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


def beside_originals(made: Tensor, originals: Tensor) -> dict[str, float]:
    """How vectors ``[R, F]`` of a task's networks lie beside those of its originals ``[R, F]``.

    ``nearest_neighbour_accuracy`` (1-NNA; 0.5 is perfect), ``coverage`` (share of the originals that are the nearest of
    one of the networks) and ``nearest`` (mean distance to the nearest original), all in class probabilities.
    """
    between, own, theirs = distances(made, originals), distances(made, made), distances(originals, originals)
    return {
        "nearest_neighbour_accuracy": nearest_neighbour_accuracy(own, theirs, between),
        "coverage": coverage(between),
        "nearest": between.amin(1).mean().item(),
    }


def _mean_overlap(answers: Tensor, targets: Tensor) -> Tensor:
    """Mean error IoU of two different networks of one task: ``[R, B]``, ``[B]``."""
    overlap = error_iou(answers, answers, targets)
    num = len(answers)
    return (overlap.sum() - overlap.diagonal().sum()) / (num * (num - 1))


def measure_diversity(
    task: ImageTaskFamily,
    draws: Sequence[Parts],
    bits: Tensor,
    originals_spread: float,
    workers: Workers | None = None,
    rows: Sequence[int] | None = None,
) -> dict[str, Any]:
    """How several networks for one task differ on test images, and what their vote gains: by name, as reports have it.

    Args:
        draws: R times networks for the same T tasks, in the same parts.
        bits: the tasks ``[T, C]``.
        originals_spread: root mean square deviation of the seen tasks' weights from their mean, to compare with.
        rows: the tasks that ``draws`` are for, those of this process; all when None.
    """
    workers, rows = workers or Workers(), range(len(bits)) if rows is None else rows
    own: list[tuple[Tensor, float, int]] = []
    for parts in steps("generating several networks a task", zip(*draws, strict=True)):
        made = torch.stack([task.probabilities(each, "test") for each in parts])
        for number in range(made.shape[1]):
            deviations = [torch.stack([each[name][number] for each in parts]).double().std(0) for name in parts[0]]
            square = sum(each.square().sum().item() for each in deviations)
            own.append((made[:, number].clone(), square, sum(each.numel() for each in deviations)))
    every, all_squares, counts = zip(*workers.collect(rows, own, len(bits)), strict=True)
    squares, count = sum(all_squares), sum(counts)
    probabilities = torch.stack(every, 1)  # [R, T, images, 2]
    answers = probabilities.argmax(-1)
    targets = task.targets(bits, "test")
    pairs = [(a, b) for a in range(len(draws)) for b in range(a)]
    return {
        "num_tasks": len(bits),
        "networks_per_task": len(draws),
        "disagreement": sum((answers[a] != answers[b]).double().mean().item() for a, b in pairs) / len(pairs),
        "mean_accuracy": (answers == targets).double().mean().item(),
        "ensemble_accuracy": (probabilities.mean(0).argmax(-1) == targets).double().mean().item(),
        "weight_spread": (squares / count) ** 0.5 / originals_spread,
    }


NUM_WORST = 5


def base_summed(task: ImageTaskFamily, probabilities: Tensor, bits: Tensor, split: str) -> Tensor:
    """Accuracy ``[T]`` of the shared base network whose class probabilities are summed over each side of a task."""
    positive = bits.to(probabilities.dtype) @ probabilities.T  # [T, images]
    return ((positive > 0.5) == task.targets(bits, split).bool()).double().mean(1)


def worst_tasks(task: ImageTaskFamily, probabilities: Tensor, bits: Tensor, split: str) -> list[dict[str, Any]]:
    """The tasks at which networks do worst: bits, accuracy, and the share of right answers for each class of images.

    Args:
        probabilities: of one network for each task, ``[T, images, 2]``.
        bits: the tasks ``[T, C]``.
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

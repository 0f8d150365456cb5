"""Several networks generated for one task: what sampling adds.

R draws, T tasks, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rpg.evaluation.task_networks import Parts
from rpg.evaluation.workers import Workers
from rpg.section import Section
from rpg.tasks.base import ImageTaskFamily
from tokenization.checkpoint.progress import steps


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

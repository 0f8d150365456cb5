"""Networks as initial weights: accuracy by fine-tuning steps, from generated weights, baselines and meta-learning.

T tasks, B images, N steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rpg.config import ControlConfig
from rpg.evaluation.report import AT_DISTANCE, TRAINED_FROM
from rpg.seeding import make_rng
from rpg.tasks.base import ImageClassifier, Task
from rpg.tasks.collecting import descend, warm_cosine
from rpg.tasks.side_by_side import SideBySide, Stacked, join_stacked, repeat, stack, unstack
from tokenization.checkpoint.progress import steps
from tokenization.checkpoint.structure import StateDict
from tokenization.errors import InputError

LEARNING_RATE, IMAGES, IMAGES_CHOSEN_BY = 1e-2, 64, 200
"""Of fine-tuning: Adam's rate, and images of a step; images that a specialist is chosen by."""

INNER_STEPS, INNER_IMAGES = 10, 32
"""Steps of each task in a step of meta-learning, and their images."""


def fine_tuning(
    task: Any, starts: Mapping[str, Stacked], conditions: Tensor, marks: Sequence[int], *, split: str = "test",
    seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Accuracy ``[N, T]`` after so many steps of Adam on all training images, by start.

    Args:
        task: trains and scores many networks at once: ``behaviour_losses`` and ``accuracies``.
        starts: by name, a network for each task.
        conditions: the tasks ``[T, C]``.
        marks: numbers of steps, ascending; 0 is the start itself. All networks see the same images.
    """
    num, every = len(conditions), conditions.repeat(len(starts), 1)
    joined = join_stacked(list(starts.values()))
    weights = {name: value.clone().requires_grad_() for name, value in joined.items()}
    optimizer = torch.optim.Adam(list(weights.values()), LEARNING_RATE, fused=True)
    rng, found = make_rng(seed, "fine-tuning"), []
    for step in steps("fine-tuning starts", range(max(marks) + 1)):
        if step in marks:
            now = {name: value.detach() for name, value in weights.items()}
            found.append(task.accuracies(now, every, split).view(len(starts), num))
        if step < max(marks):
            descend(optimizer, task.behaviour_losses(weights, every, IMAGES, rng).sum())
    return dict(zip(starts, torch.stack(found, 1), strict=True))


def best_of(task: Any, networks: Stacked, conditions: Tensor, seed: int = 0) -> Tensor:
    """For each task ``[T, C]`` the network with the least loss on its training images, ``[T]`` long."""
    num = len(next(iter(networks.values())))
    losses = [
        task.behaviour_losses(networks, each.expand(num, -1), IMAGES_CHOSEN_BY, make_rng(seed, "best of"))
        for each in steps("choosing specialists", conditions)
    ]
    return torch.stack(losses).argmin(1)


def inner_steps(task: Any, start: Stacked, conditions: Tensor, rng: torch.Generator) -> Stacked:
    """Networks after a few steps for the tasks ``[T, C]``, by Adam without momentum, as in Reptile's paper."""
    weights = {name: value.requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.Adam(list(weights.values()), LEARNING_RATE, betas=(0.0, 0.999), fused=True)
    for _ in range(INNER_STEPS):
        descend(optimizer, task.behaviour_losses(weights, conditions, INNER_IMAGES, rng).sum())
    return {name: value.detach() for name, value in weights.items()}


def reptile(
    task: Any, start: Mapping[str, Tensor], conditions: Tensor, num_steps: int, *, tasks: int = 20, rate: float = 1.0,
    learn: Callable[[Any, Stacked, Tensor, torch.Generator], Stacked] = inner_steps, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Weights from which tasks are learned fast (Reptile, arXiv 1803.02999), meta-learned on ``conditions``.

    Args:
        task: as `fine_tuning` takes it.
        conditions: the tasks to learn from ``[T, C]``.
        num_steps: outer steps; their size falls from ``rate`` to 0.
        tasks: of each outer step.
        learn: trains networks for some of the tasks, given ``task``, their starts, these tasks and random numbers.
    """
    rng, mean = make_rng(seed, "reptile"), {name: value.clone() for name, value in start.items()}
    for step in steps("meta-learning", range(num_steps)):
        chosen = conditions[torch.randperm(len(conditions), generator=rng)[:tasks]]
        learned = learn(task, repeat(mean, len(chosen)), chosen, rng)
        for name, value in mean.items():
            value.lerp_(learned[name].mean(0), rate * (1 - step / num_steps))
    return mean


START_NAMES = tuple(name + AT_DISTANCE for name in ("noise", "coordinate_gaussian", "run_coordinate_gaussian"))
"""The baselines that are trained: the best places to start from, of each kind."""


def finetuned_baselines(
    task: Task, sets: Mapping[str, Sequence[StateDict]], config: ControlConfig, seed: int
) -> dict[str, list[dict[str, Tensor]]]:
    """Every set of networks trained for each number of steps, by the name ``<steps>_steps_from_<set>``.

    Raises:
        InputError: the task has no images.
    """
    return {
        f"{steps}{TRAINED_FROM}{name}": finetune(task, networks, steps, config, make_rng(seed, "control", name, steps))
        for name, networks in sets.items()
        for steps in config.steps
    }


def finetune(
    task: Task, networks: Sequence[StateDict], steps: int, config: ControlConfig, rng: torch.Generator
) -> list[dict[str, Tensor]]:
    """Networks after ``steps`` of AdamW on the task's training images; none shares memory with those given.

    Batch norms keep their running statistics.

    Args:
        rng: draws the images, on the CPU; all networks see the same ones.

    Raises:
        InputError: the task has no images.
    """
    if not isinstance(task, ImageClassifier):
        raise InputError(
            f"evaluate.control trains on images, which {type(task).__name__} lacks; leave it out, or choose a task "
            "with images"
        )
    network = task.build()
    side, images, labels = SideBySide(network), task.images("train"), task.labels("train")
    trained = dict(network.named_parameters())
    weights = {name: value.requires_grad_(name in trained) for name, value in stack(networks).items()}
    rate = config.learning_rate
    optimizer = torch.optim.AdamW([weights[name] for name in trained], lr=rate, weight_decay=0.0, fused=True)
    for step in range(steps):
        rows = torch.randint(len(labels), (config.batch_size,), generator=rng)
        logits = side(weights, images[rows])  # [T, B, classes]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[rows].repeat(len(networks)))
        # times their number, so that a network's gradient does not depend on how many there are
        descend(optimizer, loss * len(networks), rate * warm_cosine(step, steps))
    return unstack({name: value.detach() for name, value in weights.items()})

"""Networks as a start: how soon fine-tuning gets where, from generated weights and from what one would begin with else.

T tasks, B images, N steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rpg.seeding import make_rng
from rpg.tasks.side_by_side import Stacked, join_stacked, repeat
from tokenization.checkpoint.progress import steps


def fine_tuning(
    task: Any, starts: Mapping[str, Stacked], conditions: Tensor, marks: Sequence[int], *,
    learning_rate: float = 1e-2, images: int = 64, split: str = "test", seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Accuracy ``[N, T]`` after so many steps of Adam on all training images, by start.

    Args:
        task: trains and scores many networks at once: ``behaviour_losses`` and ``accuracies``.
        starts: by name, a network for each task.
        conditions: the tasks ``[T, C]``.
        marks: numbers of steps, ascending; 0 is the start itself.
        learning_rate: constant.
        images: of a step; all networks see the same.
        split: images to score on.
        seed: decides the images.
    """
    num, every = len(conditions), conditions.repeat(len(starts), 1)
    joined = join_stacked(list(starts.values()))
    weights = {name: value.clone().requires_grad_() for name, value in joined.items()}
    optimizer = torch.optim.Adam(list(weights.values()), learning_rate, fused=True)
    rng, found = make_rng(seed, "fine-tuning"), []
    for step in steps("fine-tuning starts", range(max(marks) + 1)):
        if step in marks:
            now = {name: value.detach() for name, value in weights.items()}
            found.append(task.accuracies(now, every, split).view(len(starts), num))
        if step < max(marks):
            optimizer.zero_grad()
            task.behaviour_losses(weights, every, images, rng).sum().backward()
            optimizer.step()
    return dict(zip(starts, torch.stack(found, 1), strict=True))


def best_of(task: Any, networks: Stacked, conditions: Tensor, images: int = 200, seed: int = 0) -> Tensor:
    """For each task ``[T, C]`` the network with the least loss on its training images, ``[T]`` long."""
    num = len(next(iter(networks.values())))
    losses = [
        task.behaviour_losses(networks, each.expand(num, -1), images, make_rng(seed, "best of"))
        for each in steps("choosing specialists", conditions)
    ]
    return torch.stack(losses).argmin(1)


def reptile(
    task: Any, start: Mapping[str, Tensor], conditions: Tensor, num_steps: int, *,
    inner_steps: int = 10, learning_rate: float = 1e-2, tasks: int = 20, images: int = 32, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Weights from which tasks are learned fast (Reptile, arXiv 1803.02999), meta-learned on ``conditions``.

    Args:
        task: as `fine_tuning` takes it.
        start: the weights to begin with.
        conditions: the tasks to learn from ``[T, C]``.
        num_steps: outer steps; their size falls from 1 to 0.
        inner_steps, learning_rate: Adam without momentum for each task, as in the paper.
        tasks, images: of each outer and each inner step.
        seed: decides tasks and images.
    """
    rng, mean = make_rng(seed, "reptile"), {name: value.clone() for name, value in start.items()}
    for step in steps("meta-learning", range(num_steps)):
        chosen = conditions[torch.randperm(len(conditions), generator=rng)[:tasks]]
        weights = {name: value.requires_grad_() for name, value in repeat(mean, len(chosen)).items()}
        optimizer = torch.optim.Adam(list(weights.values()), learning_rate, betas=(0.0, 0.999), fused=True)
        for _ in range(inner_steps):
            optimizer.zero_grad()
            task.behaviour_losses(weights, chosen, images, rng).sum().backward()
            optimizer.step()
        for name, value in mean.items():
            value.lerp_(weights[name].detach().mean(0), 1 - step / num_steps)
    return mean

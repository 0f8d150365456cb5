"""One body for all tasks and a head that is affine in the bits: a baseline for generators that learn from images.

A generator that is trained on what its networks answer may learn no more than a common body and a head that follows the
bits. Those two can be had without a generator: both start as the shared base network's weights and are trained by the
same behaviour loss on the seen tasks. T tasks, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rpg.evaluation.workers import Workers
from rpg.seeding import make_rng
from rpg.tasks.base import ImageTaskFamily
from rpg.tasks.side_by_side import Stacked, Teacher
from tokenization.checkpoint.progress import steps

LEARNING_RATES = (3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class LinearHeadTraining:
    """How a linear head is trained.

    Attributes:
        steps: of AdamW.
        batch_size: tasks a step.
        images: training images a step.
        seed: decides the tasks and images of each step.
        teacher: gives the right answers in place of the images' labels.
    """

    steps: int
    batch_size: int
    images: int
    seed: int = 0
    teacher: Teacher | None = None


class LinearHead:
    """The weights of every task: one body, and a head that is ``coefficients · (1, ±bits)``.

    A tensor of the base with the target network's shape belongs to the body; the others, with C rows in place of two,
    to the head. The head starts where the difference of the two logits is the signed sum of the base's C logits.

    Args:
        base: state dict of the base network, C logits.
        target: state dict of the target network, two logits.
    """

    def __init__(self, base: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        self.body: dict[str, Tensor] = {}
        self.head: dict[str, Tensor] = {}  # [1 + C, 2, …]
        for name, value in base.items():
            if value.shape == target[name].shape:
                self.body[name] = value.clone().requires_grad_()
            else:
                rows = torch.stack([-value, value], 1) / 2  # [C, 2, …]
                self.head[name] = torch.cat([torch.zeros_like(rows[:1]), rows]).requires_grad_()

    def __call__(self, bits: Tensor) -> Stacked:
        """Stacked weights for the tasks ``[T, C]``; the body is one memory for all."""
        signs = torch.cat([torch.ones(len(bits), 1), 2.0 * bits - 1], 1)
        heads = {name: torch.tensordot(signs, value, dims=1) for name, value in self.head.items()}
        return {**{name: value.expand(len(bits), *value.shape) for name, value in self.body.items()}, **heads}


def fit_linear_head(
    task: ImageTaskFamily, base: Mapping[str, Tensor], seen: Tensor, rate: float, training: LinearHeadTraining
) -> LinearHead:
    """Train a linear head on the tasks ``seen`` ``[T, C]``, with one cycle of the learning rate up to ``rate``."""
    model = LinearHead(base, task.build().state_dict())
    rng = make_rng(training.seed, "linear head")
    optimizer = torch.optim.AdamW([*model.body.values(), *model.head.values()], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=training.steps + 1)
    for _ in steps("training a linear head", range(training.steps)):
        bits = seen[torch.randint(len(seen), (training.batch_size,), generator=rng)]
        losses = task.behaviour_losses(model(bits), bits.float(), training.images, rng, training.teacher)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        schedule.step()
    return model


def tune_linear_head(
    task: ImageTaskFamily,
    base: Mapping[str, Tensor],
    train: Tensor,
    validation: Tensor,
    seen: Tensor,
    training: LinearHeadTraining,
    workers: Workers | None = None,
) -> tuple[LinearHead, float, float]:
    """A linear head trained on ``seen`` at the learning rate that does best on validation tasks and images.

    Args:
        task: trains and scores.
        base: state dict of the base network.
        train: tasks ``[S, C]`` on which each of ``LEARNING_RATES`` is tried.
        validation: tasks to choose by, none of them in ``train``.
        seen: tasks that the chosen rate is trained on: the same as ``train``, or with ``validation`` in addition.
        training: steps, batches and seed of every trial.
        workers: the processes that share the trials; this one alone when None.

    Returns:
        The head, the rate, and that rate's mean accuracy on ``validation``. Call the head under ``torch.no_grad()`` for
        weights alone.
    """

    def trial(_: int, rate: float) -> float:
        model = fit_linear_head(task, base, train, rate, training)
        with torch.inference_mode():
            return task.accuracies(model(validation), validation, "validation").mean().item()

    accuracies = dict(zip(LEARNING_RATES, (workers or Workers()).map(trial, LEARNING_RATES), strict=True))
    best = max(accuracies, key=lambda rate: accuracies[rate])
    return fit_linear_head(task, base, seen, best, training), best, accuracies[best]

"""Example sets: the same tasks, examples and scores for every method that is compared.

T tasks, n examples, M networks of a task, B scored images, K classes, P values of an example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rpg.models.examples import example_rows
from rpg.seeding import make_rng
from rpg.tasks.side_by_side import Stacked

SHOWN = {"test": "validation", "validation": "train"}
"""The images that examples are of, by the images that networks are scored on: no image is both."""


@dataclass(frozen=True)
class ExampleSets:
    """Tasks that nobody trained for, and how they are shown.

    Attributes:
        task: shows and scores, a :class:`rpg.tasks.sensors.sensors.SensorsTask`.
        conditions: what the tasks are, ``[T, C]``.
        split: images that networks are scored on.
        seed: decides which examples are shown.
    """

    task: Any
    conditions: Tensor
    split: str = "test"
    seed: int = 0

    def rows(self, num: int, labelled: bool) -> Tensor:
        """Sets of ``num`` examples, ``[T, num, P + K + 1]``; classes take turns where they all have room.

        The examples are the same with labels and without, and those of a smaller set are the first of a larger one.
        """
        values, classes = self.shown(num)
        return example_rows(values, classes if labelled else None, self.num_classes)

    def shown(self, num: int, show: Callable[..., Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Values ``[T, num, P]``, or what ``show`` says of them as the task's ``examples`` does, and classes
        ``[T, num]`` of the examples."""
        rng, total = make_rng(self.seed, "shown classes"), len(self.conditions)
        any_class = torch.randint(self.num_classes, (total, num), generator=rng)
        in_turn = (torch.arange(num) % self.num_classes).expand(total, -1)
        classes = any_class if num < self.num_classes else in_turn
        rng = make_rng(self.seed, "shown", num >= self.num_classes)
        show = show or self.task.examples
        parts = [show(self.conditions, each[:, None], rng, SHOWN[self.split]) for each in classes.T]
        return torch.cat(parts, 1), classes

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.task.example_classes)

    @cached_property
    def targets(self) -> Tensor:
        """Right classes of the scored images, ``[T, B]``."""
        return self.task.classes(self.split).expand(len(self.conditions), -1)

    def probabilities(self, networks: Stacked) -> Tensor:
        """Answers of M networks of every task, stacked task by task ``[T · M, *shape]``: ``[T, M, B, K]``."""
        images, made = self.task.images(self.split), list(self._by_task(networks))
        with torch.inference_mode():
            return torch.stack(
                [
                    self.task.side(own, self.task.see(images, each[None])[0]).softmax(-1)
                    for own, each in zip(made, self.conditions, strict=True)
                ]
            )

    def likelihoods(self, networks: Stacked, num: int) -> Tensor:
        """Mean log-probability that M networks of every task give ``num`` labelled examples, ``[T, M]``."""
        values, classes = self.shown(num)
        found = []
        with torch.inference_mode():
            for own, shown, right in zip(self._by_task(networks), self.task.inputs(values), classes, strict=True):
                answers = self.task.side(own, shown).log_softmax(-1)  # [M, num, K]
                found.append(answers[:, torch.arange(num), right].mean(1))
        return torch.stack(found)

    def _by_task(self, networks: Stacked) -> Iterator[Stacked]:
        total = len(next(iter(networks.values()))) // len(self.conditions)
        for first in range(0, total * len(self.conditions), total):
            yield {name: value[first : first + total] for name, value in networks.items()}

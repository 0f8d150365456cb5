"""Examples as conditions: in every step, a few of each checkpoint's task are drawn and shown to the networks.

T tasks, n examples, P values of an example, K classes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from rpg.models.batch import Batch, CodeBatch
from rpg.models.conditioning import ConditionConfig
from rpg.models.examples import example_rows, row_size
from rpg.seeding import make_rng
from rpg.tasks import task_of
from rpg.tasks.base import ExampleTask, TaskSimulator
from tokenization.errors import InputError
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.zoo import Zoo


def example_conditions(zoo: Zoo, condition: ConditionConfig, seed: int = 0) -> ExampleConditions | None:
    """Shows examples of the task that collected ``zoo``; None where conditions are of another kind."""
    return ExampleConditions(task_of(zoo), condition, seed) if condition.kind == "examples" else None


def fresh_codes(codes: CodeBatch, task: object, spec: ConditionSpec | None, rng: torch.Generator) -> CodeBatch:
    """The prior's batch with new tasks, drawn by their family, in place of the zoo's."""
    assert isinstance(task, TaskSimulator) and spec is not None
    tasks = task.draw_tasks(len(codes.noise), rng).to(codes.noise)
    return replace(codes, tasks=spec.inputs(tasks), conditions=tasks)


class ExampleConditions:
    """Puts examples in the place of what zoos say of their tasks.

    Args:
        task: shows them.
        config: how many, and whether they are labelled.
        seed: decides every draw.

    Raises:
        InputError: the task shows none, or of another number of classes.
    """

    def __init__(self, task: object, config: ConditionConfig, seed: int) -> None:
        if not isinstance(task, ExampleTask):
            raise InputError(
                f"model.condition.kind: examples needs a task that shows examples, which {type(task).__name__} does "
                "not; choose sensors"
            )
        if config.classes != len(task.class_names):
            raise InputError(
                f"model.condition.classes is {config.classes}, but the task has {len(task.class_names)}; set it to that"
            )
        self.task, self.config, self.seed = task, config, seed

    @property
    def spec(self) -> ConditionSpec:
        """What a generator's conditions are."""
        size = row_size(math.prod(self.task.example_shape), self.config.classes)
        return ConditionSpec("examples", size, tuple(self.task.class_names))

    def __call__(self, batch: Batch, step: int, number: int) -> Batch:
        """The batch as the networks see it: its conditions ``[G, C]`` become sets ``[G, n · size]``.

        Args:
            batch: with what the zoo says of the tasks.
            step: of training.
            number: which part of the step, over all processes.
        """
        assert batch.conditions is not None
        rng = make_rng(self.seed, "examples", step, number)
        codes = batch.codes
        if codes is not None and codes.conditions is not None:
            codes = replace(codes, conditions=self.draw(codes.conditions, rng))
        return replace(batch, conditions=self.draw(batch.conditions, rng), codes=codes)

    def draw(self, tasks: Tensor, rng: torch.Generator) -> Tensor:
        """Sets of training examples of the tasks ``[T, C]``, one of ``counts`` of each: ``[T, n · size]``."""
        num, num_classes = len(tasks), self.config.classes
        counts = torch.tensor(self.config.counts)[torch.randint(len(self.config.counts), (num, 1), generator=rng)]
        places = torch.arange(int(counts.max()))
        any_classes = torch.randint(num_classes, (num, len(places)), generator=rng)
        in_turn = (places % num_classes).expand(num, -1)
        classes = torch.where(counts < num_classes, any_classes, in_turn)  # [T, n]
        values = self.task.examples(tasks.cpu(), classes, rng)
        told = torch.rand(num, 1, generator=rng) < self.config.labelled
        rows = example_rows(values, torch.where(told, classes, -1), num_classes)
        return (rows * (places < counts)[..., None]).flatten(1).to(tasks.device)

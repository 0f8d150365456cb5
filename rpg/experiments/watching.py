"""How good the networks of a generator are while it is still trained: a few of them, on validation data."""

from __future__ import annotations

import torch

from rpg.evaluation.metrics import accuracy
from rpg.generation.generator import Generator
from rpg.tasks import Task, task_of
from rpg.tasks.base import Classifier, FigureTask, TaskFamily
from rpg.tasks.collecting import single_threaded
from rpg.tasks.side_by_side import stack
from rpg.training.data import training_entries
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

NUM_WATCHED = 4


class Validation:
    """Scores some networks of each generator that it is shown.

    Attributes:
        last: what was found last, in words; empty before.
    """

    def __init__(self) -> None:
        self.last = ""

    def __call__(self, generator: Generator) -> None:
        """Score `NUM_WATCHED` networks; of a family of tasks, for tasks that are held out where there are any.

        Raises:
            InputError: nothing scores them.
        """
        config, zoo = generator.config, Zoo.open(generator.config.zoo)
        if config.task is None and zoo.task is None:
            raise InputError("no task scores the networks of this zoo")
        task = task_of(zoo, config.task)
        with single_threaded():
            self.last = self._of_tasks(generator, task, zoo) if generator.condition else self._of_one(generator, task)

    def _of_tasks(self, generator: Generator, task: Task, zoo: Zoo) -> str:
        if not isinstance(task, TaskFamily) or generator.config.model.condition.kind != "binary":
            raise InputError("no task scores networks for these conditions")
        held_out = zoo.subset("validation") if "validation" not in generator.config.train.splits else []
        places = (held_out or training_entries(zoo, generator.config.train.splits))[:NUM_WATCHED]
        bits = torch.tensor([zoo.entries[place].condition for place in places]).long()
        networks = generator.one_by_one(len(bits), condition=bits.float(), seed=generator.config.seed)
        seen = "" if held_out else " on seen tasks"
        return f"accuracy {task.accuracies(stack(list(networks)), bits, 'validation').double().mean().item():.1%}{seen}"

    def _of_one(self, generator: Generator, task: Task) -> str:
        networks = list(generator.one_by_one(NUM_WATCHED, seed=generator.config.seed))
        if isinstance(task, Classifier):
            right = accuracy(task.predict(networks, "validation"), task.labels("validation"))
            return f"accuracy {right.mean().item():.1%}"
        if not isinstance(task, FigureTask):
            raise InputError("no task scores the networks of this zoo")
        found = [task.figures(each, "validation") for each in networks]
        name = next(iter(found[0]))
        return f"{name.replace('_', ' ')} {sum(each[name] for each in found) / len(found):.4g}"

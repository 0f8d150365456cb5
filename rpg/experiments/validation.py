"""How good a generator's networks are on validation data: to choose by, and while it is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rpg.config import Config
from rpg.evaluation.judges import TaskScorer
from rpg.evaluation.report import shown
from rpg.experiments.single import find_task
from rpg.generation.generator import Generator
from rpg.tasks.base import TaskFamily
from rpg.tasks.collecting import single_threaded
from rpg.training.data import training_entries
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo


class Validation:
    """Scores some networks of every generator that it is shown; the test split and unseen tasks are never looked at.

    Args:
        config: of the generators.
        zoo: theirs.
        num: networks to score, or tasks to make one for each; ``evaluate.num`` networks and all tasks when None.

    Attributes:
        task: scores.
        of: ``validation tasks``; ``seen tasks`` where none is held out; ``validation images`` of a single task.
        wanted: the condition of each network, None without any.

    Raises:
        InputError: nothing scores the networks.
    """

    def __init__(self, config: Config, zoo: Zoo, num: int | None = None) -> None:
        self.task, self.seed, self.of = find_task(config, zoo), config.seed, "validation images"
        self.scorer = TaskScorer(self.task, "validation")
        self.wanted: Sequence[Sequence[float] | None] = [None] * (num or config.evaluate.num)
        kind = config.model.condition.kind
        if kind == "none" and not isinstance(self.task, TaskFamily):
            return
        if not isinstance(self.task, TaskFamily) or not kind == self.task.condition.kind in ("binary", "vector"):
            raise InputError(
                f"the task {type(self.task).__name__} scores no networks for these conditions on validation data "
                f"(model.condition.kind is {kind})"
            )
        held_out = zoo.subset("validation") if "validation" not in config.train.splits else []
        self.of = "validation tasks" if held_out else "seen tasks"
        places = held_out or training_entries(zoo, config.train.splits)
        self.wanted = list(dict.fromkeys(zoo.entries[place].condition for place in places))[:num]

    def scores(self, generator: Generator) -> tuple[str, Tensor]:
        """The name of the first metric, and its value for each network, float64."""
        condition = None if self.wanted[0] is None else torch.tensor(self.wanted)
        with single_threaded():
            networks = generator.one_by_one(len(self.wanted), seed=self.seed, condition=condition)
            found = [self.scorer(*each, "a network") for each in zip(networks, self.wanted, strict=True)]
        name = next(iter(found[0]))
        return name, torch.tensor([each[name] for each in found], dtype=torch.float64)

    def told(self, generator: Generator) -> str:
        """The mean of the first metric, in words."""
        name, values = self.scores(generator)
        seen = " on seen tasks" if self.of == "seen tasks" else ""
        return f"{name.replace('_', ' ')} {shown(values.mean().item(), name)}{seen}"

"""What a user would do with a few labelled examples in place of a generator; each is tuned on validation tasks.

T tasks, n examples, S seen tasks, V values of a network, m directions, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from rpg.evaluation.ensembles import ensemble_metrics, sets_of_networks
from rpg.evaluation.report import Networks
from rpg.experiments.example_sets import ExampleSets
from rpg.seeding import make_rng
from rpg.tasks.side_by_side import Stacked, repeat

TUNING = tuple((steps, rate) for steps in (0, 10, 30, 100) for rate in (1e-3, 3e-3, 1e-2))
"""Steps and peak learning rate of fine-tuning."""

PENALTIES, DIRECTIONS, MAP_STEPS = (0.1, 1.0, 10.0), 32, 150
REPTILE_ROUNDS, REPTILE_STEPS, REPTILE_TASKS, REPTILE_RATE = 60, 20, 32, 0.5

Choice = Any
Maker = Callable[[ExampleSets, int, Choice], Stacked]
"""Makes a network for every task, ``[T, *shape]``, of so many labelled examples, in a way that was chosen."""


class FewExamples:
    """Methods that train on the examples.

    Args:
        task: shows and runs networks, a :class:`rpg.tasks.sensors.sensors.SensorsTask`.
        seen: conditions of the seen tasks ``[S, C]``.
        specialists: their networks, stacked.
        generalist: the one network for all tasks.
        seed: of all that is random.
    """

    def __init__(
        self, task: Any, seen: Tensor, specialists: Stacked, generalist: dict[str, Tensor], seed: int = 0
    ) -> None:
        self.task, self.seen, self.specialists, self.generalist, self.seed = task, seen, specialists, generalist, seed
        self._start: dict[str, Tensor] | None = None

    @property
    def methods(self) -> dict[str, tuple[Maker, tuple[Choice, ...]]]:
        """By name what makes networks, and the ways to choose from."""
        return {
            "best_specialist": (self._best_specialist, TUNING),
            "generalist_finetuned": (self._generalist_finetuned, TUNING),
            "reptile": (self._reptile, TUNING),
            "map_in_directions": (self._map, PENALTIES),
        }

    def scored(self, sets: ExampleSets, networks: Stacked) -> Networks:
        """A report's kind of a network for every task."""
        return sets_of_networks(sets.probabilities(networks), sets.targets, seed=self.seed)

    def accuracy(self, sets: ExampleSets, networks: Stacked) -> Tensor:
        """Of a network for every task, ``[T]``."""
        return ensemble_metrics(sets.probabilities(networks), sets.targets)["accuracy"]

    def tuned(self, name: str, validation: ExampleSets, num: int) -> Choice:
        """The way that is best on validation tasks for so many examples."""
        make, ways = self.methods[name]
        scores = [self.accuracy(validation, make(validation, num, way)).mean().item() for way in ways]
        return ways[max(range(len(ways)), key=scores.__getitem__)]

    def logistic_regression(self, sets: ExampleSets, num: int) -> Tensor:
        """Accuracy ``[T]`` of scikit-learn's on the examples' values."""
        values, classes = sets.shown(num)
        images = self.task.images(sets.split)
        found = []
        for shown, right, condition, wanted in zip(values, classes, sets.conditions, sets.targets, strict=True):
            seen = self.task.see(images, condition[None])[0].flatten(1).numpy()
            model = LogisticRegression(max_iter=300).fit(self.task.inputs(shown).flatten(1).numpy(), right.numpy())
            found.append(np.mean(model.predict(seen) == wanted.numpy()))
        return torch.tensor(np.array(found))

    def _finetuned(self, start: Stacked, sets: ExampleSets, num: int, way: Choice) -> Stacked:
        steps, learning_rate = way
        values, classes = sets.shown(num)
        batch = (self.task.inputs(values), classes)
        return self.task.train(start, lambda: batch, steps, learning_rate) if steps else start

    def _best_specialist(self, sets: ExampleSets, num: int, way: Choice) -> Stacked:
        """The specialist with the least loss on the examples, then fine-tuned."""
        values, classes = sets.shown(num)
        inputs, best = self.task.inputs(values), []
        with torch.inference_mode():
            for shown, right in zip(inputs, classes, strict=True):
                answers = self.task.side(self.specialists, shown).log_softmax(-1)  # [S, n, K]
                best.append(int(answers[:, torch.arange(num), right].mean(1).argmax()))
        return self._finetuned({name: value[best] for name, value in self.specialists.items()}, sets, num, way)

    def _generalist_finetuned(self, sets: ExampleSets, num: int, way: Choice) -> Stacked:
        return self._finetuned(repeat(self.generalist, len(sets.conditions)), sets, num, way)

    def _reptile(self, sets: ExampleSets, num: int, way: Choice) -> Stacked:
        """Fine-tuned from a start that was meta-learned on the seen tasks (Reptile, arXiv 1803.02999)."""
        if self._start is None:
            self._start = self._meta_learned()
        return self._finetuned(repeat(self._start, len(sets.conditions)), sets, num, way)

    def _meta_learned(self) -> dict[str, Tensor]:
        rng = make_rng(self.seed, "reptile")
        start = {name: value.clone() for name, value in self.generalist.items()}
        for number in range(REPTILE_ROUNDS):
            tasks = self.seen[torch.randint(len(self.seen), (REPTILE_TASKS,), generator=rng)]

            def batch(tasks: Tensor = tasks) -> tuple[Tensor, Tensor]:
                images, classes = self.task.draw(32, rng)
                return self.task.see(images, tasks), classes.expand(len(tasks), -1)

            trained = self.task.train(repeat(start, len(tasks)), batch, REPTILE_STEPS, 1e-2)
            share = REPTILE_RATE * (1 - number / REPTILE_ROUNDS)
            start = {name: torch.lerp(start[name], value.mean(0), share) for name, value in trained.items()}
        return start

    def _map(self, sets: ExampleSets, num: int, penalty: Choice) -> Stacked:
        """The likeliest network among the mean of the specialists plus their leading directions, under a Gaussian."""
        flat = torch.cat([value.flatten(1) for value in self.specialists.values()], 1)  # [S, V]
        mean = flat.mean(0)
        _, sizes, axes = torch.linalg.svd(flat - mean, full_matrices=False)
        kept = min(DIRECTIONS, len(flat) - 1)
        directions = axes[:kept] * sizes[:kept, None] / len(flat) ** 0.5
        values, classes = sets.shown(num)
        inputs = self.task.inputs(values)
        coefficients = torch.zeros(len(sets.conditions), kept, requires_grad=True)
        optimizer = torch.optim.Adam([coefficients], 0.1)

        def networks() -> Stacked:
            parts = (mean + coefficients @ directions).split([v[0].numel() for v in self.specialists.values()], 1)
            named = zip(self.specialists.items(), parts, strict=True)
            return {name: part.view(-1, *value.shape[1:]) for (name, value), part in named}

        for _ in range(MAP_STEPS):
            optimizer.zero_grad()
            fit = num * self.task.losses(networks(), inputs, classes)
            (fit + penalty * coefficients.square().sum(1) / 2).sum().backward()
            optimizer.step()
        return {name: value.detach() for name, value in networks().items()}

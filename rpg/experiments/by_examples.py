"""Networks generated from a few examples, labelled or not, compared with other uses of the same examples.

Every method sees the same tasks and examples and is scored alike; rivals are tuned on validation tasks.

T tasks, n examples, M networks of a task, B scored images, K classes, P values of an example; S seen tasks,
V values of a network, m directions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from rpg.evaluation.page.page import Page
from rpg.evaluation.report import Curve, Networks, Report, networks
from rpg.evaluation.span import FlatSpace
from rpg.evaluation.starts import INNER_IMAGES, LEARNING_RATE, reptile
from rpg.evaluation.two_sample import ensemble_metrics, sets_of_networks
from rpg.experiments.evaluating import judges
from rpg.experiments.single import generate_for, stacked_networks, tasks_scored
from rpg.generation.generator import Generator
from rpg.models.conditioning import example_rows
from rpg.seeding import make_rng
from rpg.tasks import build_task
from rpg.tasks.collecting import BASE, descend
from rpg.tasks.side_by_side import Stacked, repeat
from rpg.training.data import training_entries, zoo_conditions
from tokenization.zoo.zoo import Zoo

GROUPS = 5
"""Groups of requests, from near to far, over which errors are averaged."""


def error_by_distance(generator: Generator, conditions: Any, errors: Tensor) -> tuple[dict[str, Curve], dict[str, Any]]:
    """A curve and statistics of the measured errors ``[T]`` of requests, by distance; empty if distances are unknown.

    The statistics: ``known_to``, the number of requests ``beyond`` it, and the mean ``expected`` and ``measured`` error
    of the others.
    """
    found = generator.request(len(errors), condition=conditions).distances
    within = sorted((each.distance, each.error, error) for each, error in zip(found, errors.tolist(), strict=False)
                    if each.error is not None)  # fmt: skip
    if not within:
        return {}, {}
    table = torch.tensor(within)  # [T, 3]
    means = torch.stack([part.mean(0) for part in table.tensor_split(min(GROUPS, len(table)))])
    places, expected, measured = (tuple(column.tolist()) for column in means.unbind(1))
    curve = Curve(
        x=places, lines={"expected": expected, "measured": measured}, across="distance from what was learned",
        up="error",
    )  # fmt: skip
    figures = {
        "known_to": found[0].known_to, "beyond": len(found) - len(within), "expected": table[:, 1].mean().item(),
        "measured": table[:, 2].mean().item(),
    }  # fmt: skip
    return {"error_by_distance": curve}, {"error_by_distance": figures}


SHOWN = {"test": "validation", "validation": "train"}
"""The images that examples are of, by the images that networks are scored on: no image is both."""


@dataclass(frozen=True)
class ExampleSets:
    """Tasks that nobody trained for, and how they are shown.

    Attributes:
        task: shows and scores, a :class:`rpg.tasks.sensors.task.SensorsTask`.
        conditions: what the tasks are, ``[T, C]``.
    """

    task: Any
    conditions: Tensor
    split: str = "test"
    seed: int = 0

    @classmethod
    def of(cls, task: Any, zoo: Zoo, split: str, seed: int) -> ExampleSets:
        """The tasks of a zoo that are scored on a split."""
        return cls(task, zoo_conditions(zoo, zoo.subset(tasks_scored(split))), split, seed)

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
        found: Tensor = self.task.probabilities(networks, self.conditions, self.split)
        return found.unflatten(0, (len(self.conditions), -1))

    def scored(self, networks: Stacked, sizes: Sequence[int] = (1,)) -> Networks:
        """A report's kind of M networks of every task, in sets of some ``sizes``."""
        return sets_of_networks(self.probabilities(networks), self.targets, sizes, self.seed)

    def mean(self, networks: Stacked, metric: str = "accuracy") -> float:
        """A metric of the tasks' sets of networks (`ensemble_metrics`), its mean."""
        return ensemble_metrics(self.probabilities(networks), self.targets)[metric].mean().item()

    def finetuned(self, start: Stacked, num: int, steps: int, learning_rate: float) -> Stacked:
        """A network for every task, trained on ``num`` labelled examples."""
        values, classes = self.shown(num)
        batch = (self.task.inputs(values), classes)
        return self.task.train(start, lambda: batch, steps, learning_rate) if steps else start

    def likelihoods(self, networks: Stacked, num: int, shared: bool = False) -> Tensor:
        """Mean log-probability that M networks of every task, or ``shared`` by all, give ``num`` labelled examples.

        ``[T, M]``.
        """
        values, classes = self.shown(num)
        by_task = {} if shared else {name: each.unflatten(0, (len(values), -1)) for name, each in networks.items()}
        found = []
        with torch.inference_mode():
            for task, (shown, right) in enumerate(zip(self.task.inputs(values), classes, strict=True)):
                own = networks if shared else {name: each[task] for name, each in by_task.items()}
                answers = self.task.side(own, shown).log_softmax(-1)  # [M, num, K]
                found.append(answers[:, torch.arange(num), right].mean(1))
        return torch.stack(found)


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
        task: shows and runs networks, a :class:`rpg.tasks.sensors.task.SensorsTask`.
        seen: conditions of the seen tasks ``[S, C]``.
        specialists: their networks, stacked.
        generalist: the one network for all tasks.
    """

    def __init__(
        self, task: Any, seen: Tensor, specialists: Stacked, generalist: dict[str, Tensor], seed: int = 0
    ) -> None:
        self.task, self.seen, self.specialists, self.generalist, self.seed = task, seen, specialists, generalist, seed

    @property
    def methods(self) -> dict[str, tuple[Maker, tuple[Choice, ...]]]:
        """By name what makes networks, and the ways to choose from."""
        return {
            "best_specialist": (self._best_specialist, TUNING),
            "generalist_finetuned": (self._generalist_finetuned, TUNING),
            "reptile": (self._reptile, TUNING),
            "map_in_directions": (self._map, PENALTIES),
        }

    def tuned(self, name: str, validation: ExampleSets, num: int) -> Choice:
        """The way that is best on validation tasks for so many examples."""
        make, ways = self.methods[name]
        return max(ways, key=lambda way: validation.mean(make(validation, num, way)))

    def logistic_regression(self, sets: ExampleSets, num: int) -> Tensor:
        """Accuracy ``[T]`` of scikit-learn's on the examples' values."""
        from sklearn.linear_model import LogisticRegression  # imported here: slow

        values, classes = sets.shown(num)
        images = self.task.images(sets.split)
        found = []
        for shown, right, condition, wanted in zip(values, classes, sets.conditions, sets.targets, strict=True):
            seen = self.task.see(images, condition[None])[0].flatten(1).numpy()
            model = LogisticRegression(max_iter=300).fit(self.task.inputs(shown).flatten(1).numpy(), right.numpy())
            found.append(np.mean(model.predict(seen) == wanted.numpy()))
        return torch.tensor(np.array(found))

    def _best_specialist(self, sets: ExampleSets, num: int, way: Choice) -> Stacked:
        """The specialist with the least loss on the examples, then fine-tuned."""
        best = sets.likelihoods(self.specialists, num, shared=True).argmax(1)
        return sets.finetuned({name: value[best] for name, value in self.specialists.items()}, num, *way)

    def _generalist_finetuned(self, sets: ExampleSets, num: int, way: Choice) -> Stacked:
        return sets.finetuned(repeat(self.generalist, len(sets.conditions)), num, *way)

    def _reptile(self, sets: ExampleSets, num: int, way: Choice) -> Stacked:
        """Fine-tuned from a start that was meta-learned on the seen tasks (Reptile, arXiv 1803.02999)."""
        return sets.finetuned(repeat(self._start, len(sets.conditions)), num, *way)

    @cached_property
    def _start(self) -> dict[str, Tensor]:
        def learn(task: Any, start: Stacked, tasks: Tensor, rng: torch.Generator) -> Stacked:
            def batch() -> tuple[Tensor, Tensor]:
                images, classes = task.draw(INNER_IMAGES, rng)
                return task.see(images, tasks), classes.expand(len(tasks), -1)

            return task.train(start, batch, REPTILE_STEPS, LEARNING_RATE)

        return reptile(
            self.task, self.generalist, self.seen, REPTILE_ROUNDS, tasks=REPTILE_TASKS, rate=REPTILE_RATE, learn=learn,
            seed=self.seed,
        )  # fmt: skip

    def _map(self, sets: ExampleSets, num: int, penalty: Choice) -> Stacked:
        """The likeliest network among the mean of the specialists plus their leading directions, under a Gaussian."""
        space = FlatSpace(self.specialists)
        flat = space.flatten(self.specialists)  # [S, V]
        mean = flat.mean(0)
        _, sizes, axes = torch.linalg.svd(flat - mean, full_matrices=False)
        kept = min(DIRECTIONS, len(flat) - 1)
        directions = axes[:kept] * sizes[:kept, None] / len(flat) ** 0.5
        values, classes = sets.shown(num)
        inputs = self.task.inputs(values)
        coefficients = torch.zeros(len(sets.conditions), kept, requires_grad=True)
        optimizer = torch.optim.Adam([coefficients], 0.1)

        for _ in range(MAP_STEPS):
            fit = num * self.task.losses(space.unflatten(mean + coefficients @ directions), inputs, classes)
            descend(optimizer, (fit + penalty * coefficients.square().sum(1) / 2).sum())
        return space.unflatten((mean + coefficients @ directions).detach())


PER_CLASS = (1, 2, 5, 10, 20)
"""Examples of each class."""


@judges
def evaluate_by_examples(
    generator: Generator, zoo: Zoo, *, run: Path, seed: int, split: str, compare: bool = True
) -> tuple[Report, Page]:
    """Score networks for unseen tasks by the number of examples a class, and everything simpler.

    Args:
        generator: one of ``model.condition.kind: examples`` without codes.
        split: ``test``: unseen tasks and test images; ``validation``: validation tasks and images.
        compare: whether the rivals are trained and scored, too.
    """
    started, task = time.perf_counter(), build_task(generator.config.task)  # type: ignore[arg-type]
    wanted, tuning = (ExampleSets.of(task, zoo, each, seed) for each in (split, "validation"))
    seen = training_entries(zoo, generator.config.train.splits)
    specialists = zoo_conditions(zoo, seen), stacked_networks(zoo, seen)
    rivals = FewExamples(task, *specialists, load_file(zoo.path / BASE), seed)
    trained = wanted.scored(stacked_networks(zoo, zoo.subset(tasks_scored(split))))
    kinds: dict[int, dict[str, Networks]] = {}
    for number in PER_CLASS:
        num = number * wanted.num_classes
        found: dict[str, Networks] = {}
        for name, labelled in (("generated", True), ("generated_unlabelled", False)):
            found[name] = wanted.scored(generate_for(generator, wanted.rows(num, labelled), seed))
        for name, method in rivals.methods.items() if compare else ():
            found[name] = wanted.scored(method[0](wanted, num, rivals.tuned(name, tuning, num)))
        if compare:
            right = rivals.logistic_regression(wanted, num)
            found["logistic_regression"] = networks({"accuracy": right}, seed=seed)
        kinds[number] = {**found, "original": trained}
    first, *others = kinds
    wrong = 1 - torch.tensor(kinds[first]["generated"].metrics["accuracy"])
    calibration, extras = error_by_distance(generator, wanted.rows(first * wanted.num_classes, True), wrong)
    report = Report(
        experiment="examples", judge="sensors", split=split, seed=seed, better={"accuracy": "more", "joint": "less"},
        kinds=kinds[first], parts={f"{number} examples a class": kinds[number] for number in others},
        references=("original", "generated_unlabelled"), asked={"examples a class": first},
        curves={"Accuracy by examples": _curve(kinds), **calibration}, extras=extras,
        facts={
            **generator.facts, "processor milliseconds a network": _milliseconds(generator, wanted, seed),
            "seconds": round(time.perf_counter() - started, 1),
        },
    )  # fmt: skip
    return report, Page(f"Networks asked for by examples: {run.name}")


def _milliseconds(generator: Generator, sets: ExampleSets, seed: int) -> dict[str, float]:
    """Of the processor for a network by one labelled example a class: all sets together, and one by one (median)."""
    rows, times = sets.rows(sets.num_classes, True), []
    for request in (rows, *(rows[number % len(rows)] for number in range(100))):
        started = time.process_time()
        generator.generate(len(rows) if request is rows else 1, seed=seed, condition=request)
        times.append(1000 * (time.process_time() - started))
    return {"together": round(times[0] / len(rows), 2), "singly": round(statistics.median(times[1:]), 2)}


def _curve(kinds: Mapping[int, Mapping[str, Networks]]) -> Curve:
    first = next(iter(kinds.values()))
    means = {name: [found[name].summaries["accuracy"] for found in kinds.values()] for name in first}
    lines = {name: tuple(each.mean if each else None for each in found) for name, found in means.items()}
    return Curve(x=tuple(map(float, kinds)), lines=lines, across="examples a class", up="accuracy", log=True)

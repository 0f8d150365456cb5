"""Scores of generated networks for unseen tasks, beside simple baselines.

It works on bits, stacked weights and a family of tasks that scores them; it knows no generator.
T tasks, C classes, P values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rpg.evaluation.conditions import nearest_rows
from rpg.evaluation.regression import Regression, regression_grid, tune
from rpg.evaluation.report import Networks, networks
from rpg.evaluation.task_networks import Parts, TaskNetworks
from rpg.evaluation.workers import Workers
from rpg.seeding import make_rng
from rpg.tasks.base import ImageTaskFamily, TaskFamily
from rpg.tasks.class_splits import hamming_to_nearest
from tokenization.checkpoint.progress import steps

NUM_WORST = 5

NUM_TRIED = 3
"""Regressions of a kind that are tried as networks, where networks are large."""

METHODS = ("original", "generated", "kernel_ridge")
"""Those of which more than metrics is kept."""


def choose_regressions(
    task: TaskFamily, train: TaskNetworks, validation: TaskNetworks, workers: Workers | None = None
) -> dict[str, tuple[Regression, float]]:
    """Each kind of regression, tuned, with its validation accuracy; ``ridge`` is the best degree.

    Candidates are fitted on ``train`` alone and chosen by the validation tasks' accuracy on validation images; of large
    networks, where every candidate takes long, only those are tried whose weights come nearest. Candidates are shared
    among ``workers``.
    """
    workers = workers or Workers()
    grid = regression_grid()
    if train.is_large:
        known, crossed = train.products(train), validation.products(train)  # each reads every network, once for all
        shares = functools.partial(Regression.mixture, seen=train.bits, bits=validation.bits)
        grid = {name: _nearest_in_weights(each, shares, known, crossed) for name, each in grid.items()}

    def score(regression: Regression) -> float:
        mixture = regression.mixture(train.bits, validation.bits)
        return score_method(task, train.mixed(mixture), validation.bits, "validation").first.mean().item()

    every = [each for regressions in grid.values() for each in regressions]
    places = workers.places(len(every))
    tuned = workers.collect(places, [score(every[i]) for i in steps("tuning regressions", places)], len(every))
    found = dict(zip(every, tuned, strict=True))
    chosen = {name: tune(regressions, found.__getitem__) for name, regressions in grid.items()}
    chosen["ridge"] = max((chosen[f"ridge_degree_{degree}"] for degree in (1, 2, 3)), key=lambda each: each[1])
    return chosen


def _nearest_in_weights(
    regressions: list[Regression], mixture: Callable[[Regression], Tensor], known: Tensor, crossed: Tensor
) -> list[Regression]:
    """The ``NUM_TRIED`` regressions whose predictions lie nearest to the validation tasks' own weights.

    Args:
        regressions: one kind.
        mixture: the shares ``[V, S]`` of the S training networks in the V predictions.
        known: inner products of the training networks, ``[S, S]``.
        crossed: those of the validation tasks' own networks with them, ``[V, S]``.
    """
    errors = []
    for each in regressions:
        shares = mixture(each)  # |prediction - own|² less |own|², which is the same for all
        errors.append(((shares @ known) * shares).sum().item() - 2 * (shares * crossed).sum().item())
    order = sorted(range(len(regressions)), key=errors.__getitem__)
    return [regressions[index] for index in sorted(order[:NUM_TRIED])]


def unseen_baselines(
    seen: TaskNetworks, bits: Tensor, regressions: Mapping[str, Regression], own: bool
) -> dict[str, Parts]:
    """The networks that need no generator, for the tasks ``bits`` ``[T, C]``, by method.

    Args:
        seen: all seen tasks.
        bits: the tasks to make networks for.
        regressions: by the name they are reported under; fitted on ``seen`` here.
        own: the tasks are seen ones: the nearest seen task is then the nearest *other*.
    """
    num = len(seen.bits)
    (average,) = seen.mixed(torch.full((1, num), 1 / num, dtype=torch.float64))
    made: dict[str, Parts] = {
        "nearest_seen": seen.parts(nearest_rows(seen.bits, bits, own)),
        "average": [{name: value.expand(len(bits), *value.shape[1:]) for name, value in average.items()}],
    }
    for name, each in regressions.items():
        made[name] = seen.mixed(each.mixture(seen.bits, bits))
    return made


@dataclass(frozen=True)
class MethodScores:
    """What remains of one method's networks once they are dropped.

    Attributes:
        metrics: by name, ``[T]`` each; the first is what methods are compared by.
        probabilities: ``[T, images, 2]``, if they were asked for.
    """

    metrics: Mapping[str, Tensor]
    probabilities: Tensor | None = None

    @property
    def first(self) -> Tensor:
        """``[T]``."""
        return next(iter(self.metrics.values()))


def score_method(
    task: TaskFamily, networks: Parts, bits: Tensor, split: str = "test", keep: bool = False
) -> MethodScores:
    """Score one method's networks, a part at a time.

    Args:
        task: scores.
        networks: for the tasks, in their order.
        bits: the tasks ``[T, C]``.
        split: images or rows.
        keep: probabilities of image tasks.
    """
    metrics: list[Mapping[str, Tensor]] = []
    probabilities = []
    done = 0
    for part in networks:
        rows = bits[done : done + len(next(iter(part.values())))]
        done += len(rows)
        if not isinstance(task, ImageTaskFamily):
            metrics.append(task.scores(part, rows, split))
            continue
        found = task.probabilities(part, split)
        right = found.argmax(-1) == task.targets(rows, split)
        metrics.append({"accuracy": right.double().mean(1)})
        if keep:
            probabilities.append(found)
    joined = {name: torch.cat([each[name] for each in metrics]) for name in metrics[0]}
    return MethodScores(joined, torch.cat(probabilities) if probabilities else None)


@dataclass(frozen=True)
class SplitScores:
    """All methods on the tasks of one split.

    Attributes:
        bits: the tasks ``[T, C]``.
        hamming_to_seen: distance to the nearest seen task ``[T]``.
        metrics: by method, ``generated`` and ``kernel_ridge`` among them, and name, ``[T]`` each; the first of a
            method's metrics is what methods are compared by.
        probabilities: of ``METHODS``, of image tasks, ``[T, images, 2]``.
    """

    bits: Tensor
    hamming_to_seen: Tensor
    metrics: dict[str, Mapping[str, Tensor]]
    probabilities: dict[str, Tensor]

    def first(self, method: str) -> Tensor:
        """The first metric of a method, ``[T]``."""
        return next(iter(self.metrics[method].values()))

    def kinds(self, seed: int) -> dict[str, Networks]:
        """Every method as a kind of networks; ``generated_better`` is the share of tasks on which it is beaten."""
        found, own = {}, self.first("generated")
        for method, metrics in self.metrics.items():
            better = {"generated_better": (own > self.first(method)).double().mean().item()}
            found[method] = networks(
                metrics, distances={"hamming": self.hamming_to_seen}, conditions=self.bits, seed=seed,
                extras={} if method == "generated" else better,
            )  # fmt: skip
        return found


def score_split(
    task: TaskFamily,
    networks: Mapping[str, Parts],
    bits: Tensor,
    seen: Tensor,
    split: str = "test",
    workers: Workers | None = None,
    rows: Sequence[int] | None = None,
) -> SplitScores:
    """Score every method on the tasks ``bits`` ``[T, C]``, one after the other.

    Args:
        task: scores.
        networks: by method; ``generated`` and ``kernel_ridge`` among them.
        bits: the tasks.
        seen: bits of the seen tasks, for the distance to the nearest.
        split: images or rows.
        workers: the processes that share the tasks; this one alone when None.
        rows: the tasks that ``networks`` are for, those of this process; all when None.
    """
    workers, rows = workers or Workers(), range(len(bits)) if rows is None else rows
    own = bits[list(rows)]
    named = steps("scoring tasks", list(networks), after=0)
    scores = {name: score_method(task, networks[name], own, split, name in METHODS) for name in named}
    found = workers.collect(rows, [_row(scores, number) for number in range(len(rows))], len(bits))
    metrics: dict[str, Mapping[str, Tensor]] = {}
    kept: dict[str, Tensor] = {}
    for name, (first, held) in found[0].items():
        every = [row[name][0] for row in found]
        metrics[name] = {each: torch.stack([metric[each] for metric in every]) for each in first}
        if held is not None:
            kept[name] = torch.stack([row[name][1] for row in found])
    return SplitScores(bits, hamming_to_nearest(bits, seen)[0], metrics, kept)


def _row(scores: Mapping[str, MethodScores], number: int) -> dict[str, tuple[dict[str, Tensor], Any]]:
    """Of one task by method the metrics, and what is kept of its network."""
    return {
        name: (
            {metric: values[number].clone() for metric, values in each.metrics.items()},
            None if each.probabilities is None else each.probabilities[number].clone(),
        )
        for name, each in scores.items()
    }


def base_summed(task: ImageTaskFamily, probabilities: Tensor, bits: Tensor, split: str) -> Tensor:
    """Accuracy ``[T]`` of the shared base network whose class probabilities are summed over each side of a task."""
    positive = bits.to(probabilities.dtype) @ probabilities.T  # [T, images]
    return ((positive > 0.5) == task.targets(bits, split).bool()).double().mean(1)


def random_other(bits: Tensor, seen: Tensor, seed: int) -> Tensor:
    """For each task the bits of a random seen task: what a generator is asked that is not told the task."""
    rng = make_rng(seed, "no condition")
    return seen[torch.randint(len(seen), (len(bits),), generator=rng)]


def worst_tasks(task: ImageTaskFamily, probabilities: Tensor, bits: Tensor, split: str) -> list[dict[str, Any]]:
    """The tasks at which networks do worst: bits, accuracy, and the share of right answers for each class of images.

    Args:
        task: knows the right answers.
        probabilities: of one network for each task, ``[T, images, 2]``.
        bits: the tasks ``[T, C]``.
        split: images.
    """
    right = (probabilities.argmax(-1) == task.targets(bits, split)).double()  # [T, images]
    accuracies = right.mean(1)
    rows = accuracies.argsort()[:NUM_WORST]
    classes = task.classes(split)
    shares = torch.stack([right[rows][:, classes == each].mean(1) for each in range(bits.shape[1])], 1)  # [W, C]
    return [
        {"bits": bits[row].tolist(), "accuracy": accuracies[row].item(), "accuracy_of_class": share}
        for row, share in zip(rows.tolist(), shares.tolist(), strict=True)
    ]

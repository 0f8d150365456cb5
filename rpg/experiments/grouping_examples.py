"""Groupings of classes asked for by a few labelled images, or of symbols by a few rows of text, beside what the shared
base network says of the grouping.

T tasks, n examples, S groupings of the family, C classes, B scored images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.evaluation.page.page import Page
from rpg.evaluation.report import Networks, Report, networks
from rpg.evaluation.two_sample import sets_of_networks
from rpg.experiments.by_examples import SHOWN as SHOWN_OF
from rpg.experiments.by_examples import ExampleSets
from rpg.experiments.evaluating import judges
from rpg.experiments.single import generate_for, stacked_networks, tasks_scored
from rpg.generation.generator import Generator
from rpg.tasks import build_task
from rpg.tasks.language.config import LanguageConfig
from rpg.tasks.language.rows import IGNORED, MARKER, Rows
from rpg.tasks.side_by_side import Stacked
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

SHOWN, ROWS_SHOWN = (5, 10, 20, 50), (1, 2, 5, 10)
"""Examples of a grouping, whose two sides take turns; rows of an adapter's task."""

METRICS = ("symbol_accuracy", "exact_match")
"""Of adapters."""


@judges
def evaluate_groupings(generator: Generator, zoo: Zoo, *, run: Path, seed: int, split: str) -> tuple[Report, Page]:
    """Score networks for unseen groupings by the number of examples.

    Args:
        generator: one of ``model.condition.kind: examples`` on a family of groupings.
        split: ``test``: unseen groupings and test images; ``validation``: those to choose by.
    """
    task: Any = build_task(generator.config.task)  # type: ignore[arg-type]
    sets, of_rows = ExampleSets.of(task, zoo, split, seed), isinstance(task.config, LanguageConfig)
    shown = ROWS_SHOWN if of_rows else SHOWN
    scored, posterior = (_by_rows if of_rows else _by_images)(task, zoo, sets)
    original = scored(stacked_networks(zoo, zoo.subset(tasks_scored(split))))
    kinds = {
        num: {
            "generated": scored(generate_for(generator, sets.rows(num, not of_rows), seed)),
            "base_posterior": posterior(num),
            "original": original,
        }
        for num in shown
    }
    report = Report(
        experiment="groupings", judge=f"{len(sets.conditions)} groupings", split=split, seed=seed,
        better=dict.fromkeys(METRICS, "more") if of_rows else {"accuracy": "more", "joint": "less"},
        kinds=kinds[shown[0]], parts={f"{num} examples": kinds[num] for num in shown[1:]},
        asked={"examples": shown[0]}, facts=generator.facts,
        notes=("base posterior: no network is generated; the base network's class probabilities are summed by how "
               "likely each grouping of the family is, given the examples.",),
    )  # fmt: skip
    return report, Page(f"Groupings asked for by examples: {run.name}")


Judges = tuple[Callable[[Stacked], Networks], Callable[[int], Networks]]
"""Of generated networks, and of what the base's posterior answers by so many examples."""


def _by_images(task: Any, zoo: Zoo, sets: ExampleSets) -> Judges:
    targets = task.targets(sets.conditions, sets.split)  # [T, B]

    def kind(probabilities: Tensor) -> Networks:
        return sets_of_networks(probabilities[:, None], targets, seed=sets.seed)

    return (
        lambda made: kind(task.probabilities(made, sets.split)),
        lambda num: kind(_base_answers(task, zoo, sets, num)),
    )


def _by_rows(task: Any, zoo: Zoo, sets: ExampleSets) -> Judges:
    """Of adapters for strings of symbols, some of which become a marker.

    Raises:
        InputError: the tasks are others.
    """
    if task.config.symbols is None:
        raise InputError("the base's posterior is known for tasks of symbols alone; set task.symbols")
    marker, *symbols = task.tokenizer.convert_tokens_to_ids([MARKER, *task.condition.names])
    groupings, places = task.conditions().double(), task.places(sets.conditions)

    def answered(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """The base's probabilities of symbols ``[B, K, C]``, what follows ``[B, K]``, and where that is scored."""
        probabilities, targets = (each.cpu() for each in task.shown.expected(rows))
        return probabilities[..., symbols].double(), targets, (targets != IGNORED) & (targets != rows.end)

    def posterior(num: int) -> Networks:
        numbers, right, exact = sets.shown(num, task.example_numbers)[0], [], []
        for place, chosen in zip(places, numbers, strict=True):
            rows = task.rows(place)
            seen, targets, there = answered(rows[SHOWN_OF[sets.split]][chosen])
            bits = bit_posterior(seen[there][None], (targets == marker)[there][None].long(), groupings)[0]  # [C]
            seen, targets, there = answered(rows[sets.split])
            scores = torch.cat([(seen @ bits)[..., None], seen * (1 - bits)], -1)  # [B, K, 1 + C]
            same = torch.tensor([marker, *symbols])[scores.argmax(-1)] == targets
            right.append(same[there].double().mean())
            exact.append((same | ~there).all(1).double().mean())
        return networks(dict(zip(METRICS, map(torch.stack, (right, exact)), strict=True)), seed=sets.seed)

    def scored(made: Stacked) -> Networks:
        found = task.scores(made, sets.conditions, sets.split)
        return networks({name: found[name] for name in METRICS}, seed=sets.seed)

    return scored, posterior


def _base_answers(task: Any, zoo: Zoo, sets: ExampleSets, num: int) -> Tensor:
    """Probabilities ``[T, B, 2]`` of both sides by the base network and the exact posterior over all groupings."""
    values, sides = sets.shown(num)
    with torch.inference_mode():
        seen = task.teacher(zoo)(task.inputs(values).flatten(0, 1)).view(*sides.shape, -1)  # [T, n, C]
    expected = bit_posterior(seen.double(), sides, task.bits().double())
    positive = expected @ task.base_probabilities(zoo, sets.split).double().T  # [T, B]
    return torch.stack([1 - positive, positive], -1).clamp(0, 1)


def bit_posterior(seen: Tensor, sides: Tensor, groupings: Tensor) -> Tensor:
    """Expected bits ``[T, C]`` given examples, all groupings being as likely before.

    Args:
        seen: class probabilities of the examples, ``[T, n, C]``.
        sides: their sides, 0 or 1, ``[T, n]``.
        groupings: ``[S, C]``.
    """
    positive = (seen @ groupings.T).clamp(1e-6, 1 - 1e-6)  # [T, n, S]
    right = torch.where(sides[..., None] > 0, positive, 1 - positive)
    return right.log().sum(1).softmax(-1) @ groupings

"""Groupings of classes asked for by a few labelled images, beside what the shared base network says of the grouping.

T tasks, n examples, S groupings of the family, C classes, B scored images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.evaluation.ensembles import sets_of_networks
from rpg.evaluation.page.page import Page, write_report
from rpg.evaluation.report import Networks, Report
from rpg.experiments.by_examples import asked
from rpg.experiments.example_sets import ExampleSets
from rpg.experiments.single import existing
from rpg.generation.generator import Generator
from rpg.tasks import build_task
from rpg.tasks.collecting import single_threaded
from rpg.tasks.side_by_side import stack
from rpg.training.data import zoo_conditions
from tokenization.zoo.locks import locks
from tokenization.zoo.zoo import Zoo

SHOWN = (5, 10, 20, 50)
"""Examples of a grouping; the two sides take turns."""


@locks(lambda run, split="test", **_: None if split == "validation" else existing(run))
def evaluate_groupings(run: Path | str, *, seed: int = 0, split: str = "test", **_: Any) -> Report:
    """Score networks for unseen groupings by the number of examples; writes ``evaluation.json`` and the page.

    Args:
        run: a run of ``model.condition.kind: examples`` on a family of groupings.
        seed: decides the examples and the networks.
        split: ``test``: unseen groupings and test images; ``validation``: those to choose by, and nothing is written.
    """
    generator = Generator.from_pretrained(run)
    task: Any = build_task(generator.config.task)  # type: ignore[arg-type]
    zoo = Zoo.open(generator.config.zoo)
    rows = zoo.subset("validation" if split == "validation" else "unseen")
    sets = ExampleSets(task, zoo_conditions(zoo, rows), split, seed)
    targets = task.targets(sets.conditions, split)  # [T, B]

    def kind(probabilities: Tensor) -> Networks:
        return sets_of_networks(probabilities[:, None], targets, seed=seed)

    with single_threaded():
        original = kind(task.probabilities(stack([zoo.state_dict(row) for row in rows]), split))
        kinds = {}
        for num in SHOWN:
            made = asked(generator, sets, num, True, seed)
            kinds[num] = {
                "generated": kind(task.probabilities(made, split)),
                "base_posterior": kind(_base_answers(task, zoo, sets, num)),
                "original": original,
            }
    report = Report(
        experiment="groupings", judge=f"{len(rows)} groupings", split=split, seed=seed,
        better={"accuracy": "more", "joint": "less"}, kinds=kinds[SHOWN[0]],
        parts={f"{num} examples": found for num, found in kinds.items() if num != SHOWN[0]},
        asked={"examples": SHOWN[0]}, facts=generator.facts,
        notes=("base posterior: no network is generated; the base network's class probabilities are summed by how "
               "likely each grouping of the family is, given the examples.",),
    )  # fmt: skip
    if split == "test":
        write_report(run, report, Page("Groupings asked for by examples"))
    return report


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

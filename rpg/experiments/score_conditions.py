"""What an evaluation by figures asks a generator for: the conditions of tasks or checkpoints that it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rpg.evaluation.conditions import Conditions
from rpg.generation.generator import Generator
from rpg.models.conditioning import are_new, regression_inputs
from tokenization.zoo.zoo import Zoo


def conditions_asked(
    generator: Generator, zoo: Zoo, trained: Sequence[int], held_out: Sequence[int], num: int, split: str
) -> tuple[Conditions, Any]:
    """What networks are made for, and the same as the generator is asked for it; nothing of one without conditions."""
    if generator.condition is None:
        return Conditions(), None
    places = _asked_entries(zoo, held_out, split) or trained
    chosen = _spread(places, num)
    own, others, wanted = ([zoo.entries[index].condition for index in each] for each in (trained, held_out, chosen))
    if zoo.condition is None or any(each is None for each in (*own, *wanted)):  # of a metric
        return Conditions(own, others), None
    text = zoo.condition.kind == "text"
    known = [zoo.condition.names[int(each[0])] for each in (*own, *wanted) if each is not None] if text else []
    if generator.texts is not None:
        inputs = torch.stack([generator.texts.condition(each) for each in known]).double()
    else:
        inputs = regression_inputs(zoo.condition.kind, torch.tensor([*own, *wanted]), zoo.condition.size)
    conditions = Conditions(
        own, others, wanted, [generator.layout.checkpoint(zoo, index) for index in chosen],
        inputs[: len(own)], inputs[len(own) :], own=places is trained, by_class=not are_new(zoo.condition.kind),
    )  # fmt: skip
    return conditions, known[len(own) :] if text else wanted


def _asked_entries(zoo: Zoo, held_out: Sequence[int], split: str) -> Sequence[int]:
    """The held-out entries to make networks for: unseen tasks where the zoo tells them apart."""
    if split == "validation":  # choices look at no unseen task
        return [index for index in held_out if zoo.entries[index].split == "validation"]
    return [index for index in held_out if zoo.entries[index].split in ("unseen", "test")] or held_out


def _spread(places: Sequence[int], num: int) -> list[int]:
    """``num`` of ``places``, evenly spaced; again and again where there are fewer."""
    chosen = places if len(places) <= num else [places[i * len(places) // num] for i in range(num)]
    return [chosen[i % len(chosen)] for i in range(num)]

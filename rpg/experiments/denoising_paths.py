"""Denoising paths: networks at several sampling steps, for a condition of the user's choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rpg.config import Config
from rpg.generation.conditions import named_condition
from rpg.generation.generator import Generator
from tokenization.checkpoint.structure import StateDict
from tokenization.errors import InputError
from tokenization.zoo.condition import ConditionSpec

NETWORKS_SHOWN, POINTS = 5, 20

HELD_VALUES = 1 << 26
"""Values up to which the networks on their way from noise are held together; of larger ones fewer are shown, if any."""

OPTION = "--denoising-path"


def denoising_path_of(
    generator: Generator, condition: Any, seed: int, measure: Callable[[Sequence[StateDict]], Tensor], *, wanted: bool
) -> list[tuple[int, Tensor]]:
    """(Sampling steps taken, a figure ``[networks]`` then) of some networks for one condition.

    Args:
        generator: makes them.
        condition: as ``Generator.generate`` takes it.
        seed: random seed.
        measure: gives networks their figure.
        wanted: show large networks, too: a single one, at no more steps than fit into the memory of the others.
    """
    num, points, size = NETWORKS_SHOWN, POINTS, generator.layout.num_values
    if size * num > HELD_VALUES:
        if not wanted:
            return []
        num, points = 1, max(2, min(points, HELD_VALUES * POINTS // NETWORKS_SHOWN // size))
    shown = generator.denoising_paths(num, seed=seed, points=points, condition=condition)
    return [(step, measure(networks)) for step, networks in shown]


def requested_condition(config: Config, spec: ConditionSpec | None, text: str) -> list[float] | str:
    """The condition that ``--denoising-path`` names, checked before anything long begins.

    Raises:
        InputError: the generator has no such condition, or makes networks in a single step.
    """
    condition = named_condition(spec, text, OPTION)
    if config.model.kind in ("kernel_ridge", "sane") or config.generate.steps < 2:
        raise InputError(
            f"{OPTION} shows networks step by step, but this generator takes one step (generate.steps); leave it out"
        )
    return condition

"""The checkpoints that a generator learned from, as what its networks are compared with.

N networks, n originals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rpg.evaluation.vectors import StateDict
from rpg.experiments.evaluating import zoo_span
from rpg.experiments.field_pictures import learned_originals
from rpg.experiments.single import parts_of
from rpg.generation.generator import Generator
from rpg.tasks.base import Task
from rpg.tasks.fields.fields import FieldsTask
from tokenization.errors import InputError
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.zoo import Zoo

MOST = 4096
"""Originals that networks are compared with; of a larger zoo every few."""

COLUMNS = 600
"""Values of a network that a picture of its parameters shows."""


@dataclass(frozen=True)
class Neighbour:
    """An original near a network.

    Attributes:
        index: its entry in the zoo.
        name: what it was trained for, its run and its step.
        distance: in the median distance of an original to its nearest neighbour.
    """

    index: int
    name: str
    distance: float


class Originals:
    """What a generator learned from, placed once. Raises InputError if there is nothing, or it is broken.

    Args:
        generator: its layout says how checkpoints are compared.
        zoo: the checkpoints.
        task: of fields, altered copies are left out.
    """

    def __init__(self, generator: Generator, zoo: Zoo, task: Task | None) -> None:
        config = generator.config
        self.fields = isinstance(task, FieldsTask)
        trained = learned_originals(zoo, config) if self.fields else parts_of(zoo, config)[0]
        if not trained:
            raise InputError(f"{zoo.path} holds no checkpoint that the generator learned from; put its zoo back")
        self.zoo, self.layout, self.total = zoo, generator.layout, len(trained)
        self.several_steps = len({entry.step for entry in zoo.entries}) > 1
        self.indices = trained[:: -(-len(trained) // MOST)]
        self.span = zoo_span(generator, zoo, self.indices)
        self.unit = self.span.unit() or 1.0

    def __len__(self) -> int:
        return len(self.indices)

    def state_dict(self, index: int) -> StateDict:
        """An entry's network, in the form that the layout gives it."""
        return self.layout.checkpoint(self.zoo, index).state_dict()

    def name(self, index: int) -> str:
        """What an entry was trained for, its run, and its step where they have several."""
        entry = self.zoo.entries[index]
        run = self.zoo.runs[entry.run] if entry.run < len(self.zoo.runs) else f"run {entry.run}"
        step = f", step {entry.step}" if self.several_steps else ""
        where = f"image {entry.run}" if self.fields else f"{run}{step}"
        what = told(self.zoo.condition, entry.condition)
        return f"{what} ({where})" if what else where

    def nearest(self, networks: Sequence[StateDict], num: int = 3) -> list[list[Neighbour]]:
        """The originals nearest to each of N networks, by all values, each layer in units of its spread."""
        distances = self.span.distances(self.span.place(networks)) / self.unit  # [N, n]
        least = distances.topk(min(num, len(self)), largest=False)
        return [
            [Neighbour(self.indices[i], self.name(self.indices[i]), each) for i, each in zip(row, far, strict=True)]
            for row, far in zip(least.indices.tolist(), least.values.tolist(), strict=True)
        ]

    def deviations(self, networks: Sequence[StateDict]) -> Tensor:
        """Values evenly picked from networks ``[N, columns]``: deviations from the mean, in their layers' spread."""
        rows = []
        for network in networks:
            parts = [
                (network[name].flatten().float() - self.span.means[name]) / scale
                for name, scale in self.span.scales.items()
            ]
            values = torch.cat(parts)
            rows.append(values[torch.linspace(0, len(values) - 1, min(COLUMNS, len(values))).round().long()])
        return torch.stack(rows).nan_to_num()


def told(spec: ConditionSpec | None, condition: Sequence[float] | str | None) -> str:
    """A condition in words; nothing where there is none."""
    if condition is None or isinstance(condition, str):
        return condition or ""
    if spec is None or spec.kind == "vector":
        name = f"{spec.names[0]} " if spec is not None and len(spec.names) == 1 else ""
        return name + ", ".join(f"{value:.4g}" for value in condition)
    if spec.kind == "binary":
        names = spec.names or tuple(str(place) for place in range(spec.size))
        return ", ".join(name for name, bit in zip(names, condition, strict=True) if bit) or "none"
    place = int(condition[0])
    return spec.names[place] if spec.names else f"class {place}"

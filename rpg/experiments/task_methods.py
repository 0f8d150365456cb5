"""The networks that are compared for tasks nobody trained, by method: generated, originals and what is trivial.

T tasks, C condition values, S seen tasks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rpg.evaluation.adapter_merges import PeftMerges
from rpg.evaluation.network_merges import AFFORDABLE_MERGES, NetworkMerges
from rpg.evaluation.regression import Regression
from rpg.evaluation.task_networks import Parts, TaskNetworks, in_parts
from rpg.evaluation.unseen_tasks import random_other, unseen_baselines
from rpg.generation.generator import Generator
from rpg.generation.sampler import Partition
from rpg.seeding import derive_seed
from rpg.tasks.base import TaskFamily
from rpg.tasks.side_by_side import Stacked, stack
from tokenization.errors import InputError
from tokenization.layouts import Layout
from tokenization.zoo.zoo import Zoo


@dataclass(frozen=True)
class Methods:
    """What makes networks for tasks.

    Attributes:
        generator: makes those that are compared.
        zoo: what it learned from.
        seen: the networks of all seen tasks, as the generator's layout cuts them.
        regressions: by the name they are reported under; ``kernel_ridge`` among them.
        task: knows what a task's training began with, from which networks are merged as deviations.
        seed: decides everything random.
        partition: which tasks this process makes networks for.
    """

    generator: Generator
    zoo: Zoo
    seen: TaskNetworks
    regressions: Mapping[str, Regression]
    task: TaskFamily
    seed: int = 0
    partition: Partition = field(default_factory=Partition)

    @functools.cached_property
    def merges(self) -> PeftMerges | NetworkMerges:
        """Merges the adapters of ``seen``, or its networks."""
        return merges_of(self.generator, self.zoo, self.seen)

    def rows(self, num: int) -> list[int]:
        """Which of ``num`` tasks are this process's."""
        return self.generator.share(num, self.partition)

    def networks(
        self, originals: TaskNetworks, own: bool, extra: Mapping[str, Parts] | None = None
    ) -> dict[str, Parts]:
        """Every method's networks for the tasks of ``originals`` that are this process's; nothing where there are none.

        Args:
            originals: trained for the tasks.
            own: the tasks are seen ones.
            extra: further methods' networks, for this process's tasks.
        """
        rows, bits = self.rows(len(originals.bits)), originals.bits
        if not rows:
            return {}
        mine = originals if len(rows) == len(bits) else originals.select(rows)
        others = random_other(bits, self.seen.bits, self.seed)
        return {
            "original": mine.parts(),
            "generated": parts_for(self.generator, bits, self.seed, partition=self.partition),
            "no_condition": parts_for(self.generator, others, self.seed, partition=self.partition),
            **(extra or {}),
            **unseen_baselines(self.seen, mine.bits, self.regressions, own),
            **self._merged(mine.bits),
        }

    def _merged(self, bits: Tensor) -> dict[str, Parts]:
        """Merges of the seen networks with the largest shares in kernel ridge, for the tasks ``[T, C]``."""
        shares = self.regressions["kernel_ridge"].mixture(self.seen.bits, bits)

        whole = isinstance(self.merges, NetworkMerges) and self.seen.is_large
        begun: Stacked = {}
        if isinstance(self.merges, NetworkMerges) and not whole:
            begun = next(iter(self.task.untrained(self.zoo, bits).values()))

        def made(method: str) -> Iterator[Any]:
            for number, (row, task) in enumerate(zip(shares, bits, strict=True)):
                seed = derive_seed(self.seed, method, *task.tolist())
                if isinstance(self.merges, PeftMerges):
                    yield self.merges.merge(method, row, seed)
                    continue
                base, place = (
                    (next(iter(self.task.untrained(self.zoo, task[None]).values())), 0) if whole else (begun, number)
                )
                yield self.merges.merge(method, row, seed, {name: value[place] for name, value in base.items()})

        return {method: in_parts(made(method)) for method in (AFFORDABLE_MERGES if whole else self.merges.methods)}


def untrained(task: TaskFamily, zoo: Zoo, bits: Tensor, part_size: int) -> dict[str, Parts]:
    """What the training of each task ``[T, C]`` began with, by the name it is reported under."""
    parts = bits.split(part_size)

    def made(name: str) -> Parts:
        for each in parts:
            yield task.untrained(zoo, each)[name]

    return {name: made(name) for name in task.untrained(zoo, parts[0][:1])}


def as_many(networks: TaskNetworks, num: int) -> TaskNetworks:
    """At most ``num`` of them, far apart."""
    return networks.select(torch.linspace(0, len(networks.bits) - 1, min(num, len(networks.bits))).round().long())


def parts_for(generator: Generator, bits: Tensor, seed: int, **options: Any) -> Parts:
    """One generated network for each task ``[T, C]``, a part at a time."""
    return in_parts(generator.one_by_one(len(bits), condition=bits.float(), seed=seed, **options))


def generate_for(generator: Generator, bits: Tensor, seed: int, **options: Any) -> Stacked:
    """One generated network for each task ``[T, C]``, stacked."""
    return stack(generator.generate(len(bits), condition=bits.float(), seed=seed, **options))  # type: ignore[arg-type]


def merges_of(generator: Generator, zoo: Zoo, seen: TaskNetworks) -> PeftMerges | NetworkMerges:
    """Merges the networks of seen tasks; adapters as they were saved."""
    if generator.adapter is None:
        return NetworkMerges(seen.checkpoints)
    last = {tuple(map(int, entry.condition or ())): index for index, entry in enumerate(zoo.entries)}
    adapters = [zoo.checkpoint(last[tuple(bits)]) for bits in seen.bits.tolist()]
    canonical = generator.layout.canonical
    return PeftMerges(generator.adapter, adapters, None if canonical is None else canonical.apply)


def networks_of(zoo: Zoo, split: str, layout: Layout | None = None) -> TaskNetworks:
    """The last checkpoint of every task of a split; with a layout as that cuts them, LoRA pairs in canonical form.

    Raises:
        InputError: the split is empty.
    """
    last = {zoo.entries[index].run: index for index in zoo.subset(split)}
    if not last:
        raise InputError(f"{zoo.path} has no task of split {split!r}; change task.unseen")
    bits = torch.tensor([zoo.entries[index].condition for index in last.values()]).long()
    opened = zoo.checkpoint if layout is None else functools.partial(layout.checkpoint, zoo)
    return TaskNetworks(bits, [opened(index) for index in last.values()])

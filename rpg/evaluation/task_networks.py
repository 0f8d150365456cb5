"""Many networks of many tasks, a part at a time, and a linear head on the base network as their baseline.

T networks or tasks, S seen ones, C condition values, V values of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from rpg.evaluation.workers import Workers
from rpg.seeding import make_rng
from rpg.tasks.base import ImageTaskFamily
from rpg.tasks.side_by_side import LARGE, Stacked, Teacher, stack
from tokenization.checkpoint.checkpoint import Checkpoint, StateDict
from tokenization.checkpoint.progress import steps

PART_BYTES = 1 << 29
"""Networks of this many bytes in all, and one at least, are held at once."""

BLOCK = 1 << 15
"""Values of a tensor that are read of all networks at once."""

Parts = Iterable[Stacked]
"""Networks of one structure in the order of their tasks, some at a time."""


@dataclass(frozen=True)
class TaskNetworks:
    """One checkpoint for each of some tasks; values stay on disk until they are asked for.

    Attributes:
        bits: ``[T, C]``.
        checkpoints: T of one structure.
    """

    bits: Tensor
    checkpoints: Sequence[Checkpoint]

    @property
    def num_values(self) -> int:
        """Values of a network."""
        return sum(math.prod(info.shape) for info in self.checkpoints[0].tensors.values())

    @property
    def is_large(self) -> bool:
        """Whether one network fills the machine without company."""
        return self.num_values >= LARGE

    @cached_property
    def _all(self) -> Stacked:
        return stack([each.state_dict() for each in self.checkpoints])

    @property
    def part_size(self) -> int:
        """How many networks are held at once."""
        return max(1, PART_BYTES // max(1, sum(info.num_bytes for info in self.checkpoints[0].tensors.values())))

    @property
    def _in_memory(self) -> bool:
        return len(self.checkpoints) <= self.part_size

    def select(self, rows: Tensor | Sequence[int]) -> TaskNetworks:
        """Some of them, in the order of ``rows``."""
        chosen = torch.as_tensor(rows)
        return TaskNetworks(self.bits[chosen], [self.checkpoints[row] for row in chosen.tolist()])

    def join(self, other: TaskNetworks) -> TaskNetworks:
        """These and then others."""
        return TaskNetworks(torch.cat([self.bits, other.bits]), [*self.checkpoints, *other.checkpoints])

    def weights(self) -> Stacked:
        """All of them in memory, ``[T, *shape]``."""
        return self._all

    def parts(self, rows: Tensor | None = None) -> Iterator[Stacked]:
        """All of them, or those of ``rows``."""
        if self._in_memory:
            yield self._all if rows is None else {name: value[rows] for name, value in self._all.items()}
            return
        chosen = range(len(self.checkpoints)) if rows is None else rows.tolist()
        yield from in_parts(self.checkpoints[row].load() for row in chosen)

    def mixed(self, mixture: Tensor) -> Iterator[Stacked]:
        """Networks that are weighted sums of these: shares ``[T', T]`` → T' networks; small ones in float64."""
        first, dtype = self.checkpoints[0], torch.float32 if self.is_large else torch.float64
        for shares in mixture.to(dtype).split(self.part_size):
            stored: Stacked = {}
            for name, info in first.tensors.items():
                if not info.averaged:
                    stored[name] = first.tensor(name).expand(len(shares), *info.shape)
                    continue
                made = [(shares @ block.to(dtype)).to(info.dtype) for block in self._blocks(name)]
                stored[name] = torch.cat(made, 1).view(len(shares), *info.shape)
            yield {name: stored[first.ties.get(name, name)] for name in first.order}

    def products(self, other: TaskNetworks) -> Tensor:
        """Inner products with other networks, ``[T, T']``, after the first of ``other`` has been taken off all."""
        total = torch.zeros(len(self.checkpoints), len(other.checkpoints), dtype=torch.float64)
        for name, info in self.checkpoints[0].tensors.items():
            if info.averaged:
                for own, others in zip(self._blocks(name), other._blocks(name), strict=True):
                    total += ((own - others[:1]).float() @ (others - others[:1]).float().T).double()
        return total

    def spread(self) -> float:
        """Root mean square deviation of a value from its mean over the networks."""
        total, count = 0.0, 0
        for name, info in self.checkpoints[0].tensors.items():
            if info.averaged:
                for block in self._blocks(name):
                    total += block.double().std(0).square().sum().item()
                    count += block.shape[1]
        return (total / count) ** 0.5

    def _blocks(self, name: str) -> Iterator[Tensor]:
        """The values of a tensor, of all networks: ``[T, at most BLOCK]`` each."""
        if self._in_memory:
            yield from self._all[name].flatten(1).split(BLOCK, 1)
            return
        total = math.prod(self.checkpoints[0].info(name).shape)
        for start in range(0, total, BLOCK):
            yield torch.stack([each.flat(name)[start : start + BLOCK] for each in self.checkpoints])
            for each in self.checkpoints:
                each.release(name, start, min(start + BLOCK, total))


def in_parts(networks: Iterable[StateDict]) -> Iterator[Stacked]:
    """Networks that come one after another, stacked some at a time."""
    source = iter(networks)
    for first in source:
        size = sum(value.nbytes for value in first.values())
        yield stack([first, *islice(source, max(0, PART_BYTES // max(1, size) - 1))])


LEARNING_RATES = (3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class LinearHeadTraining:
    """How a linear head is trained.

    Attributes:
        seed: decides the tasks and images of each step.
        teacher: gives the right answers in place of the images' labels.
    """

    steps: int
    batch_size: int
    images: int
    seed: int = 0
    teacher: Teacher | None = None


class LinearHead:
    """The weights of every task: one body, and a head that is ``coefficients · (1, ±bits)``.

    A tensor of the base with the target network's shape belongs to the body; the others, with C rows in place of two,
    to the head. The head starts where the difference of the two logits is the signed sum of the base's C logits.

    Args:
        base: state dict of the base network, C logits.
        target: state dict of the target network, two logits.
    """

    def __init__(self, base: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        self.body: dict[str, Tensor] = {}
        self.head: dict[str, Tensor] = {}  # [1 + C, 2, …]
        for name, value in base.items():
            if value.shape == target[name].shape:
                self.body[name] = value.clone().requires_grad_()
            else:
                rows = torch.stack([-value, value], 1) / 2  # [C, 2, …]
                self.head[name] = torch.cat([torch.zeros_like(rows[:1]), rows]).requires_grad_()

    def __call__(self, bits: Tensor) -> Stacked:
        """Stacked weights for the tasks ``[T, C]``; the body is one memory for all."""
        signs = torch.cat([torch.ones(len(bits), 1), 2.0 * bits - 1], 1)
        heads = {name: torch.tensordot(signs, value, dims=1) for name, value in self.head.items()}
        return {**{name: value.expand(len(bits), *value.shape) for name, value in self.body.items()}, **heads}


def fit_linear_head(
    task: ImageTaskFamily, base: Mapping[str, Tensor], seen: Tensor, rate: float, training: LinearHeadTraining
) -> LinearHead:
    """Train a linear head on the tasks ``seen`` ``[T, C]``, with one cycle of the learning rate up to ``rate``."""
    model = LinearHead(base, task.build().state_dict())
    rng = make_rng(training.seed, "linear head")
    optimizer = torch.optim.AdamW([*model.body.values(), *model.head.values()], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=training.steps + 1)
    for _ in steps("training a linear head", range(training.steps)):
        bits = seen[torch.randint(len(seen), (training.batch_size,), generator=rng)]
        losses = task.behaviour_losses(model(bits), bits.float(), training.images, rng, training.teacher)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        schedule.step()
    return model


def tune_linear_head(
    task: ImageTaskFamily,
    base: Mapping[str, Tensor],
    train: Tensor,
    validation: Tensor,
    seen: Tensor,
    training: LinearHeadTraining,
    workers: Workers | None = None,
) -> tuple[LinearHead, float, float]:
    """A linear head trained on ``seen`` at the learning rate that does best on validation tasks and images.

    Args:
        train: tasks ``[S, C]`` on which each of ``LEARNING_RATES`` is tried.
        validation: tasks to choose by, none of them in ``train``.
        seen: tasks that the chosen rate is trained on: the same as ``train``, or with ``validation`` in addition.

    Returns:
        The head, the rate, and that rate's mean accuracy on ``validation``. Call the head under ``torch.no_grad()`` for
        weights alone.
    """

    def trial(_: int, rate: float) -> float:
        model = fit_linear_head(task, base, train, rate, training)
        with torch.inference_mode():
            return task.accuracies(model(validation), validation, "validation").mean().item()

    accuracies = dict(zip(LEARNING_RATES, (workers or Workers()).map(trial, LEARNING_RATES), strict=True))
    best = max(accuracies, key=lambda rate: accuracies[rate])
    return fit_linear_head(task, base, seen, best, training), best, accuracies[best]

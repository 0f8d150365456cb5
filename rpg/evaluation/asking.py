"""What networks compute, asked of one after the other: each is made, looked at and dropped. M networks of a kind."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rpg.evaluation.span import Places, ZooSpan
from rpg.evaluation.vectors import StateDict
from rpg.evaluation.workers import Workers
from rpg.tasks.base import Classifier, LogitTask
from rpg.tasks.images.images import answers
from tokenization.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class Answers:
    """What networks compute.

    Attributes:
        predictions: ``[M, images]``.
        probabilities: ``[M, images, classes]``; None of a task that gives none.
    """

    predictions: Tensor
    probabilities: Tensor | None


@dataclass(frozen=True)
class Scored(Answers):
    """What remains of networks once they are dropped: also ``places``, where they lie in the zoo."""

    places: Places


@dataclass(frozen=True)
class Made:
    """Generated networks; each is made when it is asked for.

    Attributes:
        num: of all processes.
        places: which of them this process makes.
        networks: makes them, in that order.
        asked: the checkpoint that each of all was asked to be, if any was.
    """

    num: int
    places: Sequence[int]
    networks: Iterable[StateDict]
    asked: Sequence[int] = ()


def ask(
    task: Classifier, networks: Iterable[StateDict], split: str, workers: Workers, places: Sequence[int], num: int
) -> Answers:
    """What ``num`` networks compute, one at a time; ``networks`` are this process's, those at ``places``."""
    own = workers.watch(networks)
    rows: list[tuple[Tensor, Tensor | None]]
    if isinstance(task, LogitTask):
        rows = [(answers(logits), logits.float().softmax(-1)) for logits in task.logits(own, split)]
    else:
        rows = [(task.predict([each], split)[0], None) for each in own]
    predictions, probabilities = zip(*workers.collect(places, rows, num), strict=True)
    return Answers(torch.stack(predictions), None if probabilities[0] is None else torch.stack(probabilities))


def ask_checkpoints(task: Classifier, checkpoints: Sequence[Checkpoint], split: str, workers: Workers) -> Answers:
    """What checkpoints compute."""
    places = workers.places(len(checkpoints))
    own = (load(checkpoints[place]) for place in places)
    return ask(task, own, split, workers, places, len(checkpoints))


def score(
    task: Classifier,
    networks: Iterable[StateDict],
    split: str,
    zoo: ZooSpan,
    workers: Workers,
    places: Sequence[int],
    num: int,
) -> Scored:
    """What ``num`` networks compute and where they lie, one at a time; ``networks`` are those at ``places``."""
    placed: list[Places] = []

    def place(network: StateDict) -> StateDict:
        placed.append(zoo.place([network]))
        return network

    # unlike a loop, map holds no network while the next is made
    asked = ask(task, map(place, networks), split, workers, places, num)
    return Scored(asked.predictions, asked.probabilities, Places.join(workers.collect(places, placed, num)))


class Stopwatch:
    """An iterable that takes the time its members take; ``mean`` is that of one, in seconds."""

    def __init__(self, members: Iterable[StateDict]) -> None:
        self.members, self.seconds, self.count = iter(members), 0.0, 0

    def __iter__(self) -> Iterator[StateDict]:
        return self

    def __next__(self) -> StateDict:
        started = time.perf_counter()
        member = next(self.members)
        self.seconds, self.count = self.seconds + time.perf_counter() - started, self.count + 1
        return member

    @property
    def mean(self) -> float:
        """Seconds a member."""
        return self.seconds / self.count


def load(checkpoint: Checkpoint) -> StateDict:
    """A checkpoint in memory, and no page of its file any longer."""
    state_dict = checkpoint.state_dict()
    for name in checkpoint.tensors:
        checkpoint.release(name)
    return state_dict

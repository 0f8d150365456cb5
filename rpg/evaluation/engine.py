"""The engine of evaluations: kinds of networks, made one at a time or in parts, shared among processes, and judged.

Whatever the number of networks, one part of them is in memory. N networks of a kind, T of a part, n originals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from rpg.devices import Partition
from rpg.evaluation.judges import Answer, Scorer, answers_of, less_is_better
from rpg.evaluation.report import Networks, networks
from rpg.evaluation.span import Projections
from rpg.tasks.side_by_side import Stacked, alone
from tokenization.checkpoint.checkpoint import StateDict
from tokenization.errors import InputError

T = TypeVar("T")
R = TypeVar("R")

Told = Callable[..., None]
"""Called by the first process with (networks done, networks in all, ``note`` in words)."""


class Workers:
    """Each of ``size`` processes computes some of the networks, and all of them receive what was found.

    Every process finds the same for a network, so results do not depend on the number of processes.

    Args:
        partition: which process this is; all of them make the same calls in the same order.
        report: is told of progress; networks of all kinds count together.
    """

    def __init__(self, partition: Partition | None = None, report: Told | None = None) -> None:
        self.partition = partition or Partition()
        self.report = report
        self.images = 0
        self.done, self.total, self._started = 0, 0, 0.0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.partition.rank == 0

    def expect(self, total: int, images: int = 0) -> None:
        """How many networks there will be in all, and how many images each is asked about: for progress alone."""
        self.done, self.total, self.images, self._started = 0, total, images, time.perf_counter()

    def places(self, num: int) -> list[int]:
        """Which of ``num`` networks are this process's."""
        return [place for place in range(num) if self.partition.takes(place)]

    def map(self, compute: Callable[[int, T], R], items: Sequence[T]) -> list[R]:
        """What ``compute`` gives for the place and value of every item, in their order."""
        places = self.places(len(items))
        own = map(items.__getitem__, places)
        return self.gather(lambda left, item: [compute(left[0], item)], places, own, len(items))

    def gather(
        self, compute: Callable[[Sequence[int], T], Sequence[R]], places: Sequence[int], own: Iterable[T], num: int
    ) -> list[R]:
        """What is found for all ``num`` networks, of which ``own`` are this process's, at ``places``.

        Args:
            compute: takes the places of this network and those after it, and one item of ``own``: a network, or a part
                of several; gives what it found for each of them.
        """
        remaining, found = iter(own), list[R]()
        while len(found) < len(places):
            new = compute(places[len(found) :], next(remaining))  # nothing holds an item while the next one is made
            found += new
            self._tell(len(new))
        return self.collect(places, found, num)

    def collect(self, places: Sequence[int], own: Sequence[R], num: int) -> list[R]:
        """What all processes found for ``num`` items, given what this one found for those at ``places``."""
        found = dict(zip(places, own, strict=True))
        if self.partition.size > 1:
            parts: list[Any] = [None] * self.partition.size
            torch.distributed.all_gather_object(parts, found)
            found = {place: each for part in parts for place, each in part.items()}
        return [found[place] for place in range(num)]

    def finish(self) -> None:
        """Report that all is done, also if there were fewer networks than expected."""
        if self.report is not None and self.is_first and 0 < self.done < self.total:
            self.report(self.total, self.total, note="")
        self.total = 0  # what is still computed is told to nobody

    def _tell(self, num: int) -> None:
        self.done = min(self.done + num * self.partition.size, self.total)
        if self.report is not None and self.is_first and self.total:
            rate = self.done / max(time.perf_counter() - self._started, 1e-9)
            note = f"{rate * self.images:,.0f} images/s" if self.images else ""
            self.report(self.done, self.total, note=note)


@dataclass(frozen=True)
class Made:
    """Networks of one kind; each part is made when it is asked for.

    Attributes:
        num: networks of all processes.
        places: which of them this process makes.
        parts: makes those, in that order, some at a time ``[T, *shape]``.
        known: where some of them lie, by place, if no value has to be read for it.
    """

    num: int
    places: Sequence[int]
    parts: Iterable[Stacked]
    known: Mapping[int, Projections] = field(default_factory=dict)

    @classmethod
    def singly(
        cls, num: int, places: Sequence[int], networks: Iterable[StateDict],
        known: Mapping[int, Projections] | None = None,
    ) -> Made:  # fmt: skip
        """Of networks that come one after the other."""
        return cls(num, places, map(alone, networks), known or {})


@dataclass(frozen=True)
class Seen:
    """The measurements of one network, without a zoo its answer alone.

    Attributes:
        matched: distances to the originals after hidden units were matched, ``[1, n]``.
        own: distance to the checkpoint of its condition.
        vector: normalised values.
    """

    answer: Answer
    projections: Projections | None = None
    matched: Tensor | None = None
    own: float | None = None
    vector: Tensor | None = None


@dataclass
class Kind:
    """The measurements of a kind of networks.

    Attributes:
        conditions: what they were made for, again and again.
        seconds: what making each of this process's took; None if it made none.
        distances, extras, more: what the report has of them beside the metrics.
    """

    seen: Sequence[Seen]
    conditions: Sequence[Any] = ()
    seconds: float | None = None
    distances: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """By name, float64 ``[N]`` each."""
        found = [each.answer.metrics for each in self.seen]
        return {name: torch.tensor([each[name] for each in found], dtype=torch.float64) for name in found[0]}

    @property
    def first(self) -> Tensor:
        """The metric that kinds are compared by, float64 ``[N]``."""
        return next(iter(self.metrics.values()))

    @property
    def projections(self) -> Projections:
        """Where all of them lie in the zoo."""
        return Projections.join([each.projections for each in self.seen if each.projections is not None])

    def stacked(self, name: str) -> Tensor | None:
        """The answers of all networks, stacked; None if one has none."""
        found = [getattr(each.answer, name) for each in self.seen]
        return None if not found or any(each is None for each in found) else torch.stack(found)

    def reported(self, seed: int) -> Networks:
        """The kind as reports have it; ``seed`` decides the bootstrap."""
        count = len(self.seen)
        wanted = [self.conditions[i % len(self.conditions)] for i in range(count)] if self.conditions else []
        given = wanted if all(each is not None for each in wanted) else ()
        return networks(
            self.metrics, distances=self.distances, conditions=given, count=count, seed=seed, extras=self.extras,
            **self.more,
        )  # fmt: skip


class Engine:
    """Measures networks of all kinds.

    Args:
        scorer: computes metrics; none are computed when None.

    Attributes:
        kinds: what was measured, by name.
    """

    def __init__(self, scorer: Scorer | None, workers: Workers | None = None) -> None:
        self.scorer, self.workers = scorer, workers or Workers()
        self.kinds: dict[str, Kind] = {}

    def look(self, name: str, made: Made, conditions: Sequence[Any] = (), *, keep: bool = False) -> Kind:
        """Measure the networks of one kind, part by part.

        Args:
            conditions: what they were made for, again and again; none when empty.
            keep: the class probabilities of networks of a family, too; those of single classifiers always are.

        Raises:
            InputError: the scorer refuses a network.
        """
        spent = 0.0

        def timed() -> Iterator[Stacked]:
            nonlocal spent
            started = time.perf_counter()
            for part in made.parts:
                spent += time.perf_counter() - started
                yield part
                del part
                started = time.perf_counter()

        compute = partial(self._look, name, made, conditions, keep)
        found = self.workers.gather(compute, made.places, timed(), made.num)
        self.kinds[name] = Kind(found, conditions, spent / len(made.places) if made.places else None)
        return self.kinds[name]

    def _look(
        self, kind: str, made: Made, conditions: Sequence[Any], keep: bool, left: Sequence[int], part: Stacked
    ) -> list[Seen]:
        places = left[: len(next(iter(part.values())))]
        wanted = [conditions[place % len(conditions)] if conditions else None for place in places]
        answers = answers_of(self.scorer, part, wanted, [f"network {place} of kind {kind}" for place in places], keep)
        return [
            self._seen(kind, place, answer, {name: value[row] for name, value in part.items()}, made.known.get(place))
            for row, (place, answer) in enumerate(zip(places, answers, strict=True))
        ]

    def _seen(self, kind: str, place: int, answer: Answer, network: StateDict, known: Projections | None) -> Seen:
        """What is kept of a network; ``known`` is where it lies, if that is known."""
        return Seen(answer)

    def directions(
        self, lower: Collection[str] = (), higher: Collection[str] = ()
    ) -> dict[str, Literal["more", "less"]]:
        """Whether more or less is better, for each metric in order.

        Raises:
            InputError: networks have different metrics, or `less_is_better` refuses a name.
        """
        if self.scorer is None:
            return {}
        names = list(self.kinds["original"].seen[0].answer.metrics)
        for kind, each in self.kinds.items():
            for place, seen in enumerate(each.seen):
                if set(seen.answer.metrics) != set(names):
                    raise InputError(
                        f"{self.scorer.name} gave {', '.join(seen.answer.metrics)} for network {place} of kind {kind}, "
                        f"but {', '.join(names)} for the first original; return the same metrics for every network"
                    )
        less = less_is_better(names, lower, higher)
        return {name: "less" if name in less else "more" for name in names}

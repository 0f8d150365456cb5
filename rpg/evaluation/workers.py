"""Work on many networks, divided among launched processes, and its progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from rpg.generation.sampler import Partition

T = TypeVar("T")
R = TypeVar("R")

Report = Callable[..., None]
"""Called by the first process with (networks done, networks in all, ``note`` in words)."""


class Workers:
    """Each of ``size`` processes computes some of the networks, and all of them receive what was found.

    Every process finds the same for a network, so results do not depend on the number of processes.

    Args:
        partition: which process this is; all of them make the same calls in the same order.
        report: is told of progress; networks of all kinds count together.
    """

    def __init__(self, partition: Partition | None = None, report: Report | None = None) -> None:
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
        return self.gather(compute, places, map(items.__getitem__, places), len(items))

    def gather(self, compute: Callable[[int, T], R], places: Sequence[int], own: Iterable[T], num: int) -> list[R]:
        """What ``compute`` gives for all ``num`` items, of which ``own`` are this process's, at ``places``."""
        remaining, found = iter(own), list[R]()
        for place in places:
            found.append(compute(place, next(remaining)))  # nothing holds an item while the next one is made
            self._tell(1)
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

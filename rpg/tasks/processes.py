"""Work shared among this process and others of this machine."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

Result = TypeVar("Result")

ALONE = 3.0
"""Seconds before other processes are started: to start one takes about as long."""


def spawned(processes: int) -> ProcessPoolExecutor:
    """Processes that begin anew: a fork would copy the thread pools of torch in an unknown state."""
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"))


def share(
    work: Sequence[Callable[[], Result]], processes: int, done: Callable[[int], None] | None = None
) -> list[Result]:
    """What each of ``work`` returns: done in this process and, after ``ALONE`` seconds, in ``processes - 1`` others.

    Work must pickle. ``done`` is called here with the index of each that is done, in any order, one at a time. An error
    in any process ends them all after what they are at.
    """
    found: dict[int, Result] = {}
    left, one_by_one, finished = deque(range(len(work))), threading.Lock(), threading.Event()

    def take(call: Callable[[Callable[[], Result]], Result]) -> None:
        try:
            while True:
                try:
                    index = left.popleft()
                except IndexError:
                    return
                made = call(work[index])
                with one_by_one:
                    found[index] = made
                    if done is not None:
                        done(index)
        except BaseException:
            left.clear()
            raise

    def other() -> None:
        if not finished.wait(ALONE) and left:
            with spawned(1) as pool:
                take(lambda each: pool.submit(each).result())

    with ThreadPoolExecutor(max(1, processes - 1)) as threads:
        others = [threads.submit(other) for _ in range(min(processes, len(work)) - 1)]
        try:
            take(lambda each: each())
        finally:
            finished.set()
        for each in others:
            each.result()
    return [found[index] for index in range(len(work))]


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

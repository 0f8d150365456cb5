"""Work shared among this process and others of this machine."""

from __future__ import annotations

import os
import pickle
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

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

    Work must pickle; other processes do it as it was before any began. ``done`` is called here with the index of each
    that is done, in any order, one at a time. An error in any process ends them all after what they are at.
    """
    processes = min(processes, len(work))
    # Work may share an object that it changes while it runs, such as a network with other parameters for a moment.
    pickled = pickle.dumps(list(work)) if processes > 1 else b""
    found: dict[int, Result] = {}
    left, one_by_one, finished = deque(range(len(work))), threading.Lock(), threading.Event()

    def take(call: Callable[[int], Result]) -> None:
        try:
            while True:
                try:
                    index = left.popleft()
                except IndexError:
                    return
                made = call(index)
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
                pool.submit(_receive, pickled).result()
                take(lambda index: pool.submit(_do, index).result())

    with ThreadPoolExecutor(max(1, processes - 1)) as threads:
        others = [threads.submit(other) for _ in range(processes - 1)]
        try:
            take(lambda index: work[index]())
        finally:
            finished.set()
        for each in others:
            each.result()
    return [found[index] for index in range(len(work))]


_received: list[Callable[[], Any]] = []


def _receive(pickled: bytes) -> None:
    """Take the work over; these are bytes that the process which started this one has just made."""
    _received[:] = pickle.loads(pickled)


def _do(index: int) -> Any:
    return _received[index]()


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

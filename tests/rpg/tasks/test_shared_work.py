"""Work shared between this process and others."""

import os
import threading
import time
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def processes() -> ModuleType:
    """Imported here: the other processes import this file, and need no PyTorch."""
    from rpg.tasks import processes

    return processes


def until_others_work(folder: Path) -> None:
    """Wait until two processes have begun, at most 20 s."""
    (folder / f"process-{os.getpid()}").touch()
    ends = time.monotonic() + 20
    while len(list(folder.glob("process-*"))) < 2 and time.monotonic() < ends:
        time.sleep(0.02)


def mark(folder: Path, number: int, seconds: float) -> tuple[int, int]:
    time.sleep(seconds)
    if number == 13:
        raise ValueError("thirteen")
    (folder / f"{number}").touch()
    return number, os.getpid()


class Network:
    """What several pieces of work share and change while they run, so that it cannot be pickled meanwhile."""

    def __init__(self) -> None:
        self.parameters: object = 1

    def run(self, folder: Path, number: int) -> tuple[int, int]:
        before, self.parameters = self.parameters, threading.Lock()
        until_others_work(folder)
        self.parameters = before
        return number, os.getpid()


@pytest.mark.parametrize("num", [1, 2])
def test_little_work_is_done_here_in_order(processes, tmp_path, num):
    done = []
    found = processes.share([partial(mark, tmp_path, number, 0) for number in range(5)], num, done.append)
    assert found == [(number, os.getpid()) for number in range(5)] and done == list(range(5))


def test_other_processes_take_their_part_and_results_keep_their_order(processes, tmp_path, monkeypatch):
    """Also where work changes what it shares while others are started."""
    monkeypatch.setattr(processes, "ALONE", 0.0)
    done: list[int] = []
    network = Network()
    found = processes.share([partial(network.run, tmp_path, number) for number in range(60)], 2, done.append)
    assert [number for number, _ in found] == list(range(60)) and sorted(done) == list(range(60))
    assert len({process for _, process in found}) == 2 and os.getpid() in {process for _, process in found}


@pytest.mark.parametrize("alone", [0.0, 30.0])
def test_an_error_is_raised_and_ends_what_is_left(processes, tmp_path, monkeypatch, alone):
    monkeypatch.setattr(processes, "ALONE", alone)
    work = [partial(mark, tmp_path, number, 0.01) for number in (0, 13, *range(20, 920))]
    with pytest.raises(ValueError, match="thirteen"):
        processes.share(work, 2)
    assert len(list(tmp_path.iterdir())) < 900

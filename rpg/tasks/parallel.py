"""Collecting a zoo of many tasks: in parts, over processes and machines, resumable after a kill.

Tasks are cut into parts that are trained side by side. Each part is a function of the configuration alone and is
published as one file, so that any process can train any part and a killed collection goes on where it stood. The main
process lists their networks in the zoo in the order of the tasks, as soon as a part and all before it are there.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from rpg.tasks.collecting import Progress, single_threaded
from rpg.tasks.side_by_side import Stacked
from tokenization.checkpoint.checkpoint import Checkpoint, save_checkpoint
from tokenization.files import atomic_file, remove_folder
from tokenization.zoo.manifest import ZooEntry
from tokenization.zoo.zoo import Zoo, with_digest

_METRIC = "metric/"

Result = TypeVar("Result")

ALONE = 3.0
"""Seconds before other processes are started: to start one takes about as long."""

WRITERS = 8
"""Files written at a time: most of the time of a small file is waiting for the disk."""


class Trainable(Protocol):
    """What trains parts; where the CPU computes it is sent to other processes, so it must pickle."""

    def train_part(self, tasks: list[int], folder: Path) -> tuple[list[Stacked], Mapping[str, Tensor]]:
        """Train tasks; their checkpoints in the order of steps, and each one's scores by name, ``[K, T]`` each."""


Write = Callable[[Path, int, int, Mapping[str, Tensor]], str]
"""Writes a checkpoint into the zoo folder, given task and number of the checkpoint; its place in the zoo."""


def write_file(folder: Path, task: int, number: int, state_dict: Mapping[str, Tensor]) -> str:
    """A checkpoint as one safetensors file."""
    name = f"checkpoints/{task:06d}-{number:02d}.safetensors"
    save_checkpoint(folder / name, state_dict)
    return name


def collect_many(
    zoo: Zoo,
    trainable: Trainable,
    bits: Tensor,
    splits: Sequence[str],
    group: int,
    *,
    processes: int | None = None,
    progress: Progress | None = None,
    limit: int | None = None,
    write: Write = write_file,
) -> None:
    """Train the tasks that the zoo lacks and list their networks.

    Under ``accelerate launch`` the parts are shared among the launched processes, and each trains its own one by one.

    Args:
        zoo: where the checkpoints go.
        trainable: trains parts.
        bits: the tasks ``[T, C]``: task i becomes run i.
        splits: of each task.
        group: tasks of a part.
        processes: parts trained at a time; as many as there are cores when None. A GPU takes one.
        progress: called with (tasks trained, tasks in all).
        limit: train at least this many tasks only.
        write: puts a checkpoint into the zoo.
    """
    from accelerate import PartialState

    place, folder = PartialState(), zoo.path / "parts"
    if len({entry.run for entry in zoo.entries}) == len(bits):
        if place.is_main_process:
            remove_folder(folder)  # of a collection that was killed at its very end
        return
    total = min(limit or len(bits), len(bits))
    parts = [list(range(first, min(first + group, len(bits)))) for first in range(0, total, group)]
    folder.mkdir(exist_ok=True)
    listed = {entry.run for entry in zoo.entries}
    missing = [n for n, tasks in enumerate(parts) if not _file(folder, n).exists() and not listed.issuperset(tasks)]
    mine = missing[place.process_index :: place.num_processes]
    done = sum(len(tasks) for number, tasks in enumerate(parts) if number not in missing)

    def report(number: int) -> None:
        nonlocal done
        done += len(parts[number])
        if place.is_main_process:
            _list_parts(zoo, parts, folder, bits, splits, write)
        if progress is not None:
            progress(done, len(bits))

    if processes is None:
        processes = 1 if place.num_processes > 1 else num_cores()
    share(
        [partial(_train_part, trainable, parts[number], number, folder) for number in mine], processes,
        lambda index: report(mine[index]),
    )  # fmt: skip
    place.wait_for_everyone()
    if place.is_main_process:
        _list_parts(zoo, parts, folder, bits, splits, write)
        if total == len(bits):
            remove_folder(folder)
    place.wait_for_everyone()


@single_threaded()
def _train_part(trainable: Trainable, tasks: list[int], number: int, folder: Path) -> None:
    if _file(folder, number).exists():  # by another process meanwhile
        return
    checkpoints, metrics = trainable.train_part(tasks, folder.parent)
    tensors = {
        f"{step}/{name}": value.contiguous() for step, each in enumerate(checkpoints) for name, value in each.items()
    }
    scores = {f"{_METRIC}{name}": value.double().contiguous() for name, value in metrics.items()}
    with atomic_file(_file(folder, number)) as temporary:
        save_file({**tensors, **scores}, temporary)


def _list_parts(
    zoo: Zoo, parts: list[list[int]], folder: Path, bits: Tensor, splits: Sequence[str], write: Write
) -> None:
    """List the finished parts up to the first unfinished one; their files are then deleted."""
    listed = {entry.run for entry in zoo.entries}
    for number, tasks in enumerate(parts):
        wanted = [task for task in tasks if task not in listed]
        if wanted:
            if not _file(folder, number).exists():
                return
            _list_part(zoo, _file(folder, number), wanted, tasks, bits, splits, write)
        _file(folder, number).unlink(missing_ok=True)


def _list_part(
    zoo: Zoo, file: Path, wanted: list[int], tasks: list[int], bits: Tensor, splits: Sequence[str], write: Write
) -> None:
    """Append the networks of a part to the zoo; the manifest grows by all of them or none."""
    tensors = load_file(file)
    metrics = {key.removeprefix(_METRIC): tensors.pop(key) for key in list(tensors) if key.startswith(_METRIC)}
    (zoo.path / "checkpoints").mkdir(exist_ok=True)
    num_checkpoints = len(next(iter(metrics.values())))
    entries = []
    for task in wanted:
        row = tasks.index(task)
        for number in range(num_checkpoints):
            prefix = f"{number}/"
            state_dict = {
                key.removeprefix(prefix): value[row] for key, value in tensors.items() if key.startswith(prefix)
            }
            name = write(zoo.path, task, number, state_dict)
            entry = ZooEntry(
                file=name, run=task, step=number + 1, condition=tuple(map(float, bits[task].tolist())),
                metrics={key: float(value[number, row]) for key, value in metrics.items()}, split=splits[task],
            )  # fmt: skip
            entries.append(with_digest(entry, Checkpoint.open(zoo.path / name)))
    zoo.extend(entries)


def _file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.safetensors"


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


def append_many(zoo: Zoo, entries: Sequence[ZooEntry], state_dicts: Sequence[Mapping[str, Tensor]]) -> None:
    """Write small checkpoints side by side and list them, all or none; much faster than one by one."""

    def write(entry: ZooEntry, state_dict: Mapping[str, Tensor]) -> ZooEntry:
        save_checkpoint(zoo.path / entry.file, state_dict)
        return with_digest(entry, Checkpoint.open(zoo.path / entry.file))

    (zoo.path / "checkpoints").mkdir(exist_ok=True)
    with ThreadPoolExecutor(WRITERS) as pool:
        zoo.extend(list(pool.map(write, entries, state_dicts)))

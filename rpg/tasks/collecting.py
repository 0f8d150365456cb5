"""Collecting zoos, for all tasks: incomplete zoos, schedules, resumable training, and zoos of many tasks.

Many tasks are cut into parts that are trained side by side. Each part is a function of the configuration alone and is
published as one file, so that any process can train any part and a killed collection goes on where it stood. The main
process lists their networks in the zoo in the order of the tasks, as soon as a part and all before it are there."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rpg.devices import PATIENCE, single_threaded
from rpg.section import Section, migrate_task
from rpg.seeding import derive_seed
from rpg.tasks.base import TaskFamily
from rpg.tasks.processes import num_cores, share
from rpg.tasks.side_by_side import SideBySide, Stacked
from tokenization.checkpoint.checkpoint import Checkpoint, save_checkpoint
from tokenization.checkpoint.tensor_file import find_ties
from tokenization.errors import InputError
from tokenization.files import atomic_file, remove_folder
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.manifest import ZooEntry
from tokenization.zoo.zoo import Zoo, with_digest

Progress = Callable[[int, int], None]
"""Called with the optimizer steps done and their total over all runs."""

Tick = Callable[[int], None]
"""Called with the optimizer steps done of a run."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Floating-point dtypes by the names that configurations use."""


def open_zoo(
    path: Path | str, task: Section, condition: ConditionSpec | None = None, *, ignore: Collection[str] = ()
) -> Zoo:
    """Open the zoo at ``path`` to complete it, or create an empty one for ``task`` and ``condition``.

    Fields in ``ignore`` change no checkpoint and are not recorded. Raises InputError if the zoo there was collected
    with another configuration.
    """
    path = Path(path)
    if not (path / "zoo.json").exists():
        return Zoo.create(path, task=task.model_dump(mode="json", exclude=set(ignore)), condition=condition)
    zoo = Zoo.open(path, repair=True)
    require_same_task(zoo, task, ignore, "choose another folder, or remove this one to collect anew")
    return zoo


def require_same_task(zoo: Zoo, task: Section, ignore: Collection[str], cure: str) -> None:
    """Raise InputError, with the cure, unless a zoo was collected as configured, but for the fields in ``ignore``.

    Fields that a zoo of an earlier version does not record have their defaults.
    """
    recorded = migrate_task(zoo.require_task())
    with suppress(ValidationError):  # another task's, or a later version's
        recorded = type(task).model_validate(recorded).model_dump(mode="json")
    recorded, wanted = without_arithmetic(recorded), without_arithmetic(task.model_dump(mode="json"))
    for key in sorted((wanted.keys() | recorded.keys()) - set(ignore)):
        if recorded.get(key) != wanted.get(key):
            raise InputError(
                f"{zoo.path / 'zoo.json'} was collected with task.{key} {recorded.get(key)!r}, but "
                f"{wanted.get(key)!r} is configured; {cure}"
            )


def without_arithmetic(task: Any) -> Any:
    """A task's plain values without the precision of its training steps: a zoo may be completed on another machine."""
    if not isinstance(task, dict):
        return task
    return {key: without_arithmetic(value) for key, value in task.items() if key != "precision"}


def convert_floats(state_dict: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same state dict with its floating-point tensors in ``dtype``; tied names stay tied."""
    ties = find_ties(state_dict)
    converted = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in state_dict.items()
        if name not in ties
    }
    return {name: converted[ties.get(name, name)] for name in state_dict}


def cosine_decay(step: int, steps: int) -> float:
    """From 1 at step 0 along a cosine to 0 at ``steps`` (arXiv 1608.03983, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def warm_cosine(step: int, steps: int, warmup_steps: int = 10) -> float:
    """A cosine to 0 times a linear warm-up, which runs beside it."""
    return min(1.0, (step + 1) / warmup_steps) * cosine_decay(step, steps)


def chosen_parameters(network: nn.Module, patterns: Collection[str]) -> dict[str, nn.Parameter]:
    """The parameters whose names fit glob patterns, in their order. Raises InputError if a pattern fits none."""
    named = dict(network.named_parameters())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise InputError(
                f"task.finetune has {pattern!r}, which matches no parameter; write a glob pattern of names such as "
                f"{next(iter(named))}"
            )
    return {name: each for name, each in named.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}


def train_step(
    optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], rate: float, seed: int, step: int
) -> Tensor:
    """One optimizer step, and its loss; ``seed`` and ``step`` decide what networks with dropout draw."""
    torch.manual_seed(derive_seed(seed, "training step", step))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    found = loss()
    found.backward()
    optimizer.step()
    return found.detach()


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float | None = None) -> None:
    """One optimizer step down a loss, at the learning rate ``rate`` where one is given."""
    for group in optimizer.param_groups if rate is not None else ():
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()  # not autograd.grad: fused optimizers need gradients in the layout of the weights
    optimizer.step()


def one_cycle(
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    peak: float,
    steps: int,
    tick: Tick = lambda done: None,
) -> None:
    """Train with a one-cycle schedule (arXiv 1708.07120); ``loss`` draws a batch."""
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps + 1)
    for step in range(steps):
        descend(optimizer, loss())
        schedule.step()
        tick(step + 1)


NETWORK, OPTIMIZER, STEP = "network/", "optimizer/", "rpg.step"


class SavedTraining:
    """What training needs in order to go on to the same bits, where batches and random numbers are addressed by step.

    Args:
        path: the file; it is there only while training is under way.
        optimizer: its state, whose values are all tensors.
    """

    def __init__(self, path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.path, self.network, self.optimizer = path, network, optimizer

    def save(self, step: int) -> None:
        """Write the state after ``step`` steps, in the place of an earlier one."""
        tensors = {NETWORK + name: value for name, value in self.network.state_dict().items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{OPTIMIZER}{number}/{name}": value for name, value in values.items()}
        save_checkpoint(self.path, tensors, {STEP: str(step)})

    def load(self) -> int:
        """Restore the saved state and return its step; 0 without one. Raises InputError for a broken file."""
        if not self.path.is_file():
            return 0
        saved, network = Checkpoint.open(self.path), self.network.state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        for key in saved.order:
            stored = saved.ties.get(key, key)
            if key.startswith(NETWORK):
                network[key.removeprefix(NETWORK)].copy_(saved.tensor(stored))  # in place: never two networks
            else:
                number, name = key.removeprefix(OPTIMIZER).split("/")
                state.setdefault(int(number), {})[name] = saved.tensor(stored)
            saved.release(stored)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        return int(saved.metadata[STEP])

    def remove(self) -> None:
        """Training is done."""
        self.path.unlink(missing_ok=True)


_METRIC = "metric/"

BASE = "base.safetensors"
"""In a zoo's folder: the network that those of a family begin with."""

WRITERS = 8
"""Files written at a time: most of the time of a small file is waiting for the disk."""


class ManyTasks(TaskFamily):
    """A family of tasks whose networks are trained side by side, in parts of `group` tasks, into one zoo.

    Where the CPU computes, parts are trained in several processes, to which the family is sent: it must pickle.

    Attributes:
        config: of the family.
        unrecorded: its fields that change no checkpoint, so that a zoo may be completed under others.
        device: where parts are trained; what is no CPU trains one at a time.
    """

    config: Any
    unrecorded: tuple[str, ...] = ()
    device = torch.device("cpu")

    def conditions(self) -> Tensor:
        """The condition of every network, ``[T, C]``: network i becomes run i of the zoo."""
        raise NotImplementedError

    def train_base(self) -> Mapping[str, Tensor]:
        """The network that all of the family's begin with."""
        raise NotImplementedError

    def train_part(self, tasks: list[int], folder: Path) -> tuple[list[Stacked], Mapping[str, Tensor]]:
        """Train tasks; their checkpoints in the order of steps, and each one's scores by name, ``[K, T]`` each."""
        raise NotImplementedError

    def scores(self, weights: Stacked, bits: Tensor, split: str = "test") -> dict[str, Tensor]:
        """Metrics by name ``[T]`` of T networks at their tasks ``[T, C]``: the accuracy alone."""
        return {"accuracy": self.accuracies(weights, bits, split)}

    @property
    def group(self) -> int:
        """Tasks of a part."""
        return self.config.group

    @cached_property
    def side(self) -> SideBySide:
        """The target network as a function of many state dicts."""
        return SideBySide(self.build().to(self.device))

    def require_data(self) -> None:
        """Raise InputError where data are missing."""

    def prepare(self, folder: Path) -> None:
        """Make what all tasks share in the zoo's folder, unless it is there."""
        if not (folder / BASE).exists():
            save_checkpoint(folder / BASE, self.train_base())

    def base_network(self, zoo: Zoo) -> dict[str, Tensor]:
        """The network that all of a zoo's began with. Raises InputError if it has none."""
        file = zoo.path / BASE
        if not file.is_file():
            raise InputError(f"{file} is missing, the base network of the zoo; collect the zoo again")
        return load_file(file)

    def write(self, folder: Path, task: int, number: int, state_dict: Mapping[str, Tensor]) -> str:
        """Write a task's checkpoint of this number into the zoo's folder; its place in it."""
        name = f"checkpoints/{task:06d}-{number:02d}.safetensors"
        save_checkpoint(folder / name, state_dict)
        return name

    def collect(
        self, path: Path | str, *, progress: Progress | None = None, limit: int | None = None,
        processes: int | None = None,
    ) -> Zoo:  # fmt: skip
        """Train the networks that the zoo at ``path`` lacks, and list them.

        Under ``accelerate launch`` the parts are shared among the launched processes, and each trains its own one by
        one.

        Args:
            limit: train at least this many tasks only.
            processes: parts trained at a time on a CPU; as many as there are cores when None.
        """
        from accelerate import PartialState

        place, splits = PartialState(timeout=PATIENCE), self.splits()  # what is wrong with them is said first
        with place.main_process_first():
            self.require_data()
            zoo = open_zoo(path, self.config, self.condition, ignore=self.unrecorded)
            if place.is_main_process:
                with single_threaded():
                    self.prepare(zoo.path)
        conditions, folder = self.conditions().tolist(), zoo.path / "parts"
        num, listed = len(conditions), {entry.run for entry in zoo.entries}
        if len(listed) == num:
            if place.is_main_process:
                remove_folder(folder)  # of a collection that was killed at its very end
            return zoo
        total = min(limit or num, num)
        parts = {
            folder / f"part-{number:05d}.safetensors": list(range(first, min(first + self.group, num)))
            for number, first in enumerate(range(0, total, self.group))
        }
        folder.mkdir(exist_ok=True)
        missing = [file for file, tasks in parts.items() if not file.exists() and not listed.issuperset(tasks)]
        mine = missing[place.process_index :: place.num_processes]
        done = sum(len(tasks) for file, tasks in parts.items() if file not in missing)

        def report(index: int) -> None:
            nonlocal done
            done += len(parts[mine[index]])
            if place.is_main_process:
                self._list_parts(zoo, parts, conditions, splits)
            if progress is not None:
                progress(done, num)

        own = getattr(self.config, "processes", None)
        if self.device.type != "cpu":
            processes = own or 1
        processes = processes or own or (1 if place.num_processes > 1 else num_cores())
        share([partial(self._train_part, parts[file], file) for file in mine], processes, report)
        place.wait_for_everyone()
        if place.is_main_process:
            self._list_parts(zoo, parts, conditions, splits)
            if total == num:
                remove_folder(folder)
        place.wait_for_everyone()
        return zoo if place.is_main_process else Zoo.open(path)

    @single_threaded()
    def _train_part(self, tasks: list[int], file: Path) -> None:
        if file.exists():  # by another process meanwhile
            return
        checkpoints, metrics = self.train_part(tasks, file.parent.parent)
        tensors = {
            f"{step}/{name}": value.contiguous()
            for step, each in enumerate(checkpoints)
            for name, value in each.items()
        }
        scores = {f"{_METRIC}{name}": value.double().contiguous() for name, value in metrics.items()}
        with atomic_file(file) as temporary:
            save_file({**tensors, **scores}, temporary)

    def _list_parts(
        self, zoo: Zoo, parts: Mapping[Path, list[int]], conditions: list[list[float]], splits: list[str]
    ) -> None:
        """List the finished parts up to the first unfinished one, each whole or not at all, and delete their files."""
        listed = {entry.run for entry in zoo.entries}
        (zoo.path / "checkpoints").mkdir(exist_ok=True)
        for file, tasks in parts.items():
            if not listed.issuperset(tasks):
                if not file.exists():
                    return
                tensors = load_file(file)
                metrics = {k.removeprefix(_METRIC): tensors.pop(k) for k in list(tensors) if k.startswith(_METRIC)}
                entries = []
                for task in (each for each in tasks if each not in listed):
                    row = tasks.index(task)
                    for number in range(len(next(iter(metrics.values())))):
                        start = f"{number}/"
                        own = {k.removeprefix(start): v[row] for k, v in tensors.items() if k.startswith(start)}
                        entry = ZooEntry(
                            file=self.write(zoo.path, task, number, own), run=task, step=number + 1,
                            condition=tuple(map(float, conditions[task])), split=splits[task % len(splits)],
                            metrics={key: float(value[number, row]) for key, value in metrics.items()},
                        )  # fmt: skip
                        entries.append(with_digest(entry, Checkpoint.open(zoo.path / entry.file)))
                zoo.extend(entries)
            file.unlink(missing_ok=True)


def append_many(zoo: Zoo, networks: Iterable[tuple[ZooEntry, Mapping[str, Tensor]]]) -> None:
    """Write small checkpoints side by side and list them, all or none; much faster than one by one."""

    def write(network: tuple[ZooEntry, Mapping[str, Tensor]]) -> ZooEntry:
        entry, state_dict = network
        save_checkpoint(zoo.path / entry.file, state_dict)
        return with_digest(entry, Checkpoint.open(zoo.path / entry.file))

    (zoo.path / "checkpoints").mkdir(exist_ok=True)
    with ThreadPoolExecutor(WRITERS) as pool:
        zoo.extend(list(pool.map(write, networks)))

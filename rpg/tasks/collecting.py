"""Shared by all tasks that collect zoos: threads, incomplete zoos, schedules, and training that survives a kill."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from rpg.migration import migrate_task
from rpg.section import Section
from rpg.seeding import derive_seed
from tokenization.checkpoint.checkpoint import Checkpoint, save_checkpoint
from tokenization.checkpoint.tensor_file import find_ties
from tokenization.errors import InputError
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.zoo import Zoo

Progress = Callable[[int, int], None]
"""Called with the optimizer steps done and their total over all runs."""


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Floating-point dtypes by the names that configurations use."""


@contextmanager
def use_threads(num: int) -> Iterator[None]:
    """Run torch on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run torch on one thread: faster for small networks, and the bits do not depend on the number of cores."""
    with use_threads(1):
        yield


def open_zoo(
    path: Path | str, task: Section, condition: ConditionSpec | None = None, *, ignore: Collection[str] = ()
) -> Zoo:
    """Open the zoo at ``path`` to complete it, or create an empty one for ``task`` and ``condition``.

    Fields that a zoo of an earlier version does not record have their defaults; those in ``ignore`` change no
    checkpoint and are not recorded.

    Raises:
        InputError: the zoo there was collected with another configuration, which must not be mixed in.
    """
    path, wanted = Path(path), task.model_dump(mode="json", exclude=set(ignore))
    if not (path / "zoo.json").exists():
        return Zoo.create(path, task=wanted, condition=condition)
    zoo = Zoo.open(path, repair=True)
    recorded, wanted = without_arithmetic(recorded_task(zoo, type(task))), without_arithmetic(wanted)
    for key in sorted((wanted.keys() | recorded.keys()) - set(ignore)):
        if recorded.get(key) != wanted.get(key):
            raise InputError(
                f"{path / 'zoo.json'} was collected with task.{key} {recorded.get(key)!r}, but {wanted.get(key)!r} is "
                "configured; choose another folder, or remove this one to collect anew"
            )
    return zoo


def without_arithmetic(task: Any) -> Any:
    """A task's plain values without the precision of its training steps: a zoo may be completed on another machine."""
    if not isinstance(task, dict):
        return task
    return {key: without_arithmetic(value) for key, value in task.items() if key != "precision"}


def recorded_task(zoo: Zoo, kind: type[Section]) -> dict[str, Any]:
    """The zoo's recorded task as plain values; fields that an earlier version lacked have their defaults.

    Raises:
        InputError: the zoo records no task.
    """
    recorded = migrate_task(zoo.require_task())
    try:
        return kind.model_validate(recorded).model_dump(mode="json")
    except ValidationError:  # another task's, or a later version's
        return recorded


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


NETWORK, OPTIMIZER, STEP = "network/", "optimizer/", "rpg.step"


class SavedTraining:
    """What training needs in order to go on to the same bits, where batches and random numbers are addressed by step.

    Args:
        path: the file; it is there only while training is under way.
        network: parameters and buffers.
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
        """Restore the saved state and return its step; 0 without one.

        Raises:
            InputError: the file is broken.
        """
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

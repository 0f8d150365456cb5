"""What collecting a zoo takes: of one process, how many of them at a time, and of the disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.table import Table

from rpg.config import Config
from rpg.planning.inspect import facts_table, format_bytes
from rpg.planning.machine import num_bytes
from rpg.planning.measuring import Target, find_target
from rpg.planning.plan import CUDA_BYTES, Need, free_memory
from rpg.tasks import collecting
from rpg.tasks.class_splits import all_tasks
from rpg.tasks.images.config import (
    Cifar10SubsetsConfig,
    DigitsConfig,
    DigitsSubsetsConfig,
    ImageNetConfig,
    SubsetsConfig,
    TimmFinetuneConfig,
)
from rpg.tasks.side_by_side import LARGE
from tokenization.zoo.zoo import Zoo

NUM_CLASSES = 10

CIFAR10_BYTES = 3 * 60_000 * 3 * 32 * 32
"""Its images as they are read, in the order of channels, and by split."""


@dataclass(frozen=True)
class Collection:
    """The needs of collecting a zoo.

    Attributes:
        need: of one process, Python and its libraries apart.
        groups: how many processes at most have something to do.
        disk: bytes of the whole zoo.
    """

    need: Need
    groups: int
    disk: int

    @property
    def processes(self) -> int:
        """Processes to start: one on a GPU, on a CPU as many as there are cores and as the free memory has room for."""
        if self.need.device:
            return 1
        room = free_memory() // (self.need.host + psutil.Process().memory_info().rss)
        return max(1, min(self.groups, collecting.num_cores(), room))


def plan_collection(config: Config) -> Collection | None:
    """What collecting the zoo takes; None of a task that nothing is known of here.

    Raises InputError where the device that the task names is not there.
    """
    task, target = config.task, find_target(config.task)
    if target is None:
        return None
    if isinstance(task, DigitsSubsetsConfig | Cifar10SubsetsConfig):
        return _plan_subsets(task, target)
    assert isinstance(task, DigitsConfig | ImageNetConfig | TimmFinetuneConfig)
    step = target.step_bytes(task.batch_size)
    if step is None:
        return None
    # gradients are in the step; two moments, and the checkpoint on its way to the disk
    needed = step + 2 * target.weights + 2 * num_bytes(target.network.parameters())
    needed += target.image_bytes(task.batch_size)
    count = task.runs * task.steps if isinstance(task, DigitsConfig) else 0  # a few norms take next to nothing
    count = task.checkpoints if isinstance(task, ImageNetConfig) else count
    return _on_its_device(target, needed, 3 * target.weights, 1, count * target.weights, "lower task.batch_size")


def _plan_subsets(task: DigitsSubsetsConfig | Cifar10SubsetsConfig, target: Target) -> Collection | None:
    """Of a family of tasks, whose networks are trained in groups."""
    recipe, data = task.finetune, CIFAR10_BYTES if isinstance(task, Cifar10SubsetsConfig) else 0
    step = target.step_bytes(min(recipe.images_at_a_time or recipe.batch_size, recipe.batch_size))
    if step is None:
        return None
    is_large = num_bytes(target.network.parameters()) >= 4 * LARGE  # then one runs after the other
    written = task.group * target.weights * (1 + 2 * recipe.checkpoints)  # the start; checkpoints, once more as bytes
    # the weights, their gradients and two moments; images drawn, and as they were before they were enlarged
    needed = step * (1 if is_large else task.group) + 4 * task.group * target.weights
    needed += written + data + 2 * target.image_bytes(recipe.batch_size)
    num = num_runs(task)
    cure = "lower task.finetune.images_at_a_time or task.group"
    disk = num * recipe.checkpoints * target.weights
    return _on_its_device(target, needed, written + data, math.ceil(num / task.group), disk, cure)


def _on_its_device(target: Target, needed: int, host: int, groups: int, disk: int, cure: str) -> Collection:
    """What is ``needed`` where the task computes, and the machine's part of it where that is a GPU."""
    host, device = (needed, 0) if target.device.type == "cpu" else (host, needed + CUDA_BYTES)
    return Collection(Need("collecting", host, device, cure), groups, disk)


def num_runs(task: SubsetsConfig) -> int:
    """Networks of a family of tasks, checkpoints not counted."""
    return (task.tasks or len(all_tasks(NUM_CLASSES))) * task.copies


def collection_need(config: Config) -> Need | None:
    """What one process of it takes; None where nothing is known or left to collect. Raises as `plan_collection`."""
    task, there = config.task, (Path(config.zoo) / "zoo.json").exists()
    if isinstance(task, SubsetsConfig) and there and Zoo.open(config.zoo).num_runs >= num_runs(task):
        return None
    return planned.need if (planned := plan_collection(config)) is not None else None


def collection_table(planned: Collection) -> Table:
    """What `rpg plan` shows of it."""
    table = facts_table("collecting the zoo")
    table.add_row("memory of a process", format_bytes(planned.need.host))
    if planned.need.device:
        table.add_row("of the GPU", f"{format_bytes(planned.need.device)}, CUDA's own included")
    if planned.groups > 1:
        table.add_row("processes here", f"{planned.processes:,}, for {planned.groups:,} groups of tasks")
    table.add_row("the zoo on disk", format_bytes(planned.disk))
    return table

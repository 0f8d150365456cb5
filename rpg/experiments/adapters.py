"""Adapters of any conditions: which comparison suits them, and what comes before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rpg.config import Config
from rpg.experiments.single import collect
from rpg.tasks import build_task
from rpg.tasks.base import TaskFamily
from rpg.training.loop import train


def is_comparison_of_tasks(config: Config) -> bool:
    """Whether there are unseen tasks of binary conditions, which `rpg.experiments.held_out_tasks` compares on.

    Raises:
        InputError: the task's files or its table are not right.
    """
    task = build_task(config.task) if config.task is not None else None
    if not isinstance(task, TaskFamily):
        return False
    return config.model.condition.kind == "binary" and task.condition.kind == "binary"


def prepare_adapters(config: Config, progress: Mapping[str, Callable[..., None]]) -> None:
    """Train the adapters that the task lacks, if there is a task; then the generator, in place of one that is there.

    Args:
        config: the experiment; without a task its zoo is one that `rpg collect --from` made.
        progress: callbacks named ``collect`` (done, total) and ``train`` (done, total, loss).

    Raises:
        InputError: there is neither a task nor a zoo, or one of them does not fit.
    """
    if config.task is not None:
        collect(config, progress=progress.get("collect"))
    train(config, overwrite=True, progress=progress.get("train"))

"""Tasks made from their configurations."""

from __future__ import annotations

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any, TypeVar

from rpg.migration import migrate_task
from rpg.section import Section, validated
from rpg.tasks.base import Task
from rpg.tasks.config import TASKS, TaskConfig
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

KindOfTask = TypeVar("KindOfTask")


class _Tree(Section):
    """The place of a task in a configuration, so that errors name fields as the user writes them."""

    task: TaskConfig


def build_task(config: TaskConfig | Mapping[str, Any]) -> Task:
    """Make a task from its configuration, or from the plain values of one.

    Raises:
        InputError: there is no such task, or a field is unknown or impossible.
    """
    known: Any = config if isinstance(config, Section) else _parse(migrate_task(config))
    return resolve_name(TASKS[known.name].task)(known)


def _parse(values: Mapping[str, Any]) -> Any:
    if values.get("name") not in TASKS:
        raise InputError(f"task.name {values.get('name')!r} is not a task; choose one of {', '.join(TASKS)}")
    return validated(_Tree, {"task": dict(values)}, "").task


def task_of(zoo: Zoo, config: TaskConfig | None = None) -> Task:
    """The task of a configuration, or without one the task that collected ``zoo``, which the zoo records.

    Raises:
        InputError: the zoo records no task (a user's own checkpoints), or one this version does not know.
    """
    return build_task(config if config is not None else zoo.require_task())


def require_task(config: TaskConfig | None, kind: type[KindOfTask], cure: str) -> KindOfTask:
    """The task of a configuration, which must be of a kind. Raises InputError, with the cure, otherwise."""
    task = build_task(config) if config is not None else None
    if not isinstance(task, kind):
        raise InputError(f"task.name is {config.name if config is not None else 'none'}, {cure}")
    return task

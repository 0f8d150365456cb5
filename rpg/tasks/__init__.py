"""Tasks train the checkpoints of a zoo and score state dicts; they know nothing of generators.

Here they are made from their configurations, and users' functions and classes are loaded by module or file.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar

from rpg.section import Section, migrate_task, validated
from rpg.tasks.base import Task
from rpg.tasks.config import (
    TASKS,
    Cifar10SubsetsConfig,
    DigitsConfig,
    DigitsSubsetsConfig,
    ImageNetConfig,
    LanguageConfig,
    TaskConfig,
    TimmFinetuneConfig,
)
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

__all__ = [
    "Cifar10SubsetsConfig", "DigitsConfig", "DigitsSubsetsConfig", "ImageNetConfig", "LanguageConfig", "Task",
    "TaskConfig", "TimmFinetuneConfig", "build_task", "load_callable", "require_task", "task_of",
]  # fmt: skip

KindOfTask = TypeVar("KindOfTask")


class _Tree(Section):
    """The place of a task in a configuration, so that errors name fields as the user writes them."""

    task: TaskConfig


def build_task(config: TaskConfig | Mapping[str, Any]) -> Task:
    """Make a task from its configuration, or from the plain values of one.

    Raises InputError if there is no such task, or a field is unknown or impossible.
    """
    known: Any = config
    if not isinstance(config, Section):
        values = migrate_task(config)
        if values.get("name") not in TASKS:
            raise InputError(f"task.name {values.get('name')!r} is not a task; choose one of {', '.join(TASKS)}")
        known = validated(_Tree, {"task": dict(values)}, "").task
    return resolve_name(TASKS[known.name].task)(known)


def task_of(zoo: Zoo, config: TaskConfig | None = None) -> Task:
    """The task of a configuration, or without one the task that collected ``zoo``, which the zoo records.

    Raises InputError if it records none (a user's own checkpoints), or one that this version does not know.
    """
    return build_task(config if config is not None else zoo.require_task())


def require_task(config: TaskConfig | None, kind: type[KindOfTask], cure: str) -> KindOfTask:
    """The task of a configuration, which must be of a kind. Raises InputError, with the cure, otherwise."""
    task = build_task(config) if config is not None else None
    if not isinstance(task, kind):
        raise InputError(f"task.name is {config.name if config is not None else 'none'}, {cure}")
    return task


def load_callable(reference: str, option: str) -> Callable[..., Any]:
    """A function or class by its place: ``package.module:name`` or ``folder/file.py:name``.

    Modules are looked for in the working directory first. Raises InputError if it is not there, or importing failed.
    """
    module_name, separator, name = reference.rpartition(":")
    if not separator or not module_name or not name:
        raise InputError(f"{option} {reference!r} names no function; write package.module:function or file.py:function")
    file = Path(module_name) if module_name.endswith(".py") else None
    if file is not None and not file.is_file():
        raise InputError(f"{option}: there is no file {file}")
    folder = os.getcwd() if file is None else str(file.parent.resolve())
    sys.path.insert(0, folder)
    try:
        function: Any = importlib.import_module(module_name) if file is None else _import_file(file)
    except Exception as error:  # whatever a module of the user's does when it is imported
        raise InputError(f"{option}: {module_name} cannot be imported ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(folder)
    for part in name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise InputError(f"{option} {reference}: {module_name} has no function {name!r}")
    return function


def _import_file(path: Path) -> Any:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None  # of every path that ends with .py
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module

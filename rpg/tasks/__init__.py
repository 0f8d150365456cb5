"""Tasks: what trains the checkpoints of a zoo and scores state dicts. They know nothing of generators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeAlias

from pydantic import Field, ValidationError
from torch import Tensor, nn

from rpg.section import Section
from rpg.tasks.images.cifar10 import Cifar10SubsetsConfig, Cifar10SubsetsTask
from rpg.tasks.images.digits import DigitsConfig, DigitsTask
from rpg.tasks.images.digits_subsets import DigitsSubsetsConfig, DigitsSubsetsTask
from rpg.tasks.images.imagenet import ImageNetConfig, ImageNetTask
from rpg.tasks.images.timm_finetune import TimmFinetuneConfig, TimmFinetuneTask
from rpg.tasks.language.language import LanguageConfig, LanguageTask
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

__all__ = [
    "Cifar10SubsetsConfig",
    "Cifar10SubsetsTask",
    "DigitsConfig",
    "DigitsSubsetsConfig",
    "DigitsSubsetsTask",
    "DigitsTask",
    "ImageNetConfig",
    "ImageNetTask",
    "LanguageConfig",
    "LanguageTask",
    "Task",
    "TaskConfig",
    "TimmFinetuneConfig",
    "TimmFinetuneTask",
    "build_task",
    "task_of",
]

TaskConfig: TypeAlias = Annotated[
    DigitsConfig | DigitsSubsetsConfig | Cifar10SubsetsConfig | TimmFinetuneConfig | ImageNetConfig | LanguageConfig,
    Field(discriminator="name"),
]
"""Configuration of any task; its literal ``name`` tells which."""


class Task(Protocol):
    """What the rest of the package asks of a task."""

    def build(self) -> nn.Module:
        """The target network, untrained."""

    def collect(
        self, path: Path | str, *, progress: Callable[[int, int], None] | None = None, limit: int | None = None
    ) -> Zoo:
        """Train checkpoints into the zoo at ``path``; complete it if it is partly there."""

    def predict(self, state_dicts: Iterable[Mapping[str, Tensor]], split: str = "test") -> Tensor:
        """Predicted classes of each network, int64 [num, images]."""

    def labels(self, split: str = "test") -> Tensor:
        """Right classes, int64 [images]."""


_TASKS: dict[str, tuple[type[Section], Callable[[Any], Task]]] = {
    "digits": (DigitsConfig, DigitsTask),
    "digits_subsets": (DigitsSubsetsConfig, DigitsSubsetsTask),
    "cifar10_subsets": (Cifar10SubsetsConfig, Cifar10SubsetsTask),
    "language": (LanguageConfig, LanguageTask),
    "finetune": (TimmFinetuneConfig, TimmFinetuneTask),
    "imagenet": (ImageNetConfig, ImageNetTask),
}


def build_task(config: TaskConfig | Mapping[str, Any]) -> Task:
    """Make a task from its configuration, or from the plain values of one.

    Raises:
        InputError: there is no such task, or a field is unknown or impossible.
    """
    if isinstance(config, Section):
        return _TASKS[config.name][1](config)
    name = config.get("name")
    if name not in _TASKS:
        raise InputError("task.name", repr(name), f"one of {', '.join(_TASKS)}")
    kind, build = _TASKS[name]
    try:
        return build(kind.model_validate(dict(config)))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, ("task", *first["loc"])))
        raise InputError(field, repr(first["input"]), first["msg"].lower()) from None


def task_of(zoo: Zoo) -> Task:
    """The task that collected ``zoo``, from what the zoo itself records.

    Raises:
        InputError: the zoo records no task (a user's own checkpoints), or one this version does not know.
    """
    return build_task(zoo.require_task())

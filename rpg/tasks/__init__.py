"""Tasks train the checkpoints of a zoo and score state dicts. They know nothing of generators."""

from rpg.tasks.base import Task
from rpg.tasks.config import (
    Cifar10SubsetsConfig,
    DigitsConfig,
    DigitsSubsetsConfig,
    ImageNetConfig,
    LanguageConfig,
    TaskConfig,
    TimmFinetuneConfig,
)
from rpg.tasks.registry import build_task, require_task, task_of

__all__ = [
    "Cifar10SubsetsConfig",
    "DigitsConfig",
    "DigitsSubsetsConfig",
    "ImageNetConfig",
    "LanguageConfig",
    "Task",
    "TaskConfig",
    "TimmFinetuneConfig",
    "build_task",
    "require_task",
    "task_of",
]

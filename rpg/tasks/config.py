"""Configuration of any task. Nothing here imports what computes: who reads a configuration loads no task."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, Union

from pydantic import Field

from rpg.tasks.images.config import (
    Cifar10SubsetsConfig,
    DigitsConfig,
    DigitsSubsetsConfig,
    ImageNetConfig,
    TimmFinetuneConfig,
)
from rpg.tasks.language.config import LanguageConfig
from rpg.tasks.sensors.config import SensorsConfig

LABS = (
    "fields.config:FieldsConfig",
    "training_runs.config:TrajectoriesConfig",
    "tickets.config:TicketsConfig",
    "vision.config:DetectionConfig",
    "vision.config:SegmentationConfig",
    "vision.config:DiffusionUnetConfig",
)
"""Configurations of the labs' tasks, under `rpg.labs`: the core knows them by name alone."""

CoreTaskConfig: TypeAlias = (
    DigitsConfig
    | DigitsSubsetsConfig
    | Cifar10SubsetsConfig
    | TimmFinetuneConfig
    | ImageNetConfig
    | LanguageConfig
    | SensorsConfig
)


def of_lab(name: str) -> Any:
    """What ``module:attribute`` under `rpg.labs` names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(f"rpg.labs.{module}"), attribute)


if TYPE_CHECKING:
    TaskConfig: TypeAlias = CoreTaskConfig
else:
    TaskConfig = Annotated[Union[(CoreTaskConfig, *map(of_lab, LABS))], Field(discriminator="name")]
"""Configuration of any task; its literal ``name`` tells which."""

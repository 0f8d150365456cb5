"""Configuration of any task. Nothing here imports what computes: who reads a configuration loads no task."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, TypeAlias, Union

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
    "rpg.labs.fields.config:FieldsConfig",
    "rpg.labs.training_runs.config:TrainingRunsConfig",
    "rpg.labs.tickets.config:TicketsConfig",
    "rpg.labs.vision.config:DetectionConfig",
    "rpg.labs.vision.config:SegmentationConfig",
    "rpg.labs.vision.config:DiffusionUnetConfig",
)
"""Configurations of the labs' tasks: the core knows them by name alone."""

CoreTaskConfig: TypeAlias = (
    DigitsConfig
    | DigitsSubsetsConfig
    | Cifar10SubsetsConfig
    | TimmFinetuneConfig
    | ImageNetConfig
    | LanguageConfig
    | SensorsConfig
)


if TYPE_CHECKING:
    TaskConfig: TypeAlias = CoreTaskConfig
else:
    TaskConfig = Annotated[Union[(CoreTaskConfig, *map(resolve_name, LABS))], Field(discriminator="name")]
"""Configuration of any task; its literal ``name`` tells which."""

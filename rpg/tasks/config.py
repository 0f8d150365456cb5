"""Configuration of any task. Nothing here imports what computes: who reads a configuration loads no task."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from rpg.tasks.fields.config import FieldsConfig
from rpg.tasks.images.config import (
    Cifar10SubsetsConfig,
    DigitsConfig,
    DigitsSubsetsConfig,
    ImageNetConfig,
    TicketsConfig,
    TimmFinetuneConfig,
    TrajectoriesConfig,
)
from rpg.tasks.language.config import LanguageConfig
from rpg.tasks.sensors.config import SensorsConfig
from rpg.tasks.vision.config import DetectionConfig, DiffusionUnetConfig, SegmentationConfig

TaskConfig: TypeAlias = Annotated[
    DigitsConfig
    | DigitsSubsetsConfig
    | Cifar10SubsetsConfig
    | FieldsConfig
    | TrajectoriesConfig
    | TicketsConfig
    | TimmFinetuneConfig
    | ImageNetConfig
    | LanguageConfig
    | SensorsConfig
    | DetectionConfig
    | SegmentationConfig
    | DiffusionUnetConfig,
    Field(discriminator="name"),
]
"""Configuration of any task; its literal ``name`` tells which."""

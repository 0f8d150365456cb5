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
    TimmFinetuneConfig,
    TrajectoriesConfig,
)
from rpg.tasks.images.tickets_config import TicketsConfig
from rpg.tasks.language.config import LanguageConfig

TaskConfig: TypeAlias = Annotated[
    DigitsConfig
    | DigitsSubsetsConfig
    | Cifar10SubsetsConfig
    | FieldsConfig
    | TrajectoriesConfig
    | TicketsConfig
    | TimmFinetuneConfig
    | ImageNetConfig
    | LanguageConfig,
    Field(discriminator="name"),
]
"""Configuration of any task; its literal ``name`` tells which."""

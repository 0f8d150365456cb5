"""The table of tasks, and the configuration of any. Nothing here imports what computes."""

from __future__ import annotations

from functools import reduce
from operator import or_
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeAlias

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


class Entry(NamedTuple):
    """Where the parts of a task are, as ``module:name``; each is imported when it is needed.

    Attributes:
        config: the class of its configuration, whose literal ``name`` is the task's.
        task: the class of the task.
        experiment: the function of a configuration that makes its experiment; without one its networks are evaluated
            as single ones, or as those of unseen tasks.
        command: the command that is for this task alone.
    """

    config: str
    task: str
    experiment: str = ""
    command: str = ""


IMAGES, LABS = "rpg.tasks.images", "rpg.labs"

TASKS = {
    "digits": Entry(f"{IMAGES}.config:DigitsConfig", f"{IMAGES}.digits:DigitsTask"),
    "digits_subsets": Entry(f"{IMAGES}.config:DigitsSubsetsConfig", f"{IMAGES}.digits:DigitsSubsetsTask"),
    "cifar10_subsets": Entry(f"{IMAGES}.config:Cifar10SubsetsConfig", f"{IMAGES}.cifar10:Cifar10SubsetsTask"),
    "finetune": Entry(f"{IMAGES}.config:TimmFinetuneConfig", f"{IMAGES}.timm_finetune:TimmFinetuneTask"),
    "imagenet": Entry(f"{IMAGES}.config:ImageNetConfig", f"{IMAGES}.timm_finetune:ImageNetTask"),
    "language": Entry("rpg.tasks.language.config:LanguageConfig", "rpg.tasks.language.task:LanguageTask"),
    "sensors": Entry(
        "rpg.tasks.sensors.config:SensorsConfig", "rpg.tasks.sensors.task:SensorsTask",
        "rpg.experiments.sensors:experiment", "demo",
    ),
    "fields": Entry(
        f"{LABS}.fields.config:FieldsConfig", f"{LABS}.fields.task:FieldsTask",
        f"{LABS}.fields.experiment:experiment", "fields",
    ),
    "training_runs": Entry(
        f"{LABS}.training_runs.config:TrainingRunsConfig", f"{LABS}.training_runs.task:TrainingRunsTask",
        f"{LABS}.training_runs.experiment:experiment", "metric",
    ),
    "tickets": Entry(
        f"{LABS}.tickets.config:TicketsConfig", f"{LABS}.tickets.task:TicketsTask",
        f"{LABS}.tickets.experiment:experiment",
    ),
    "detection": Entry(f"{LABS}.vision.config:DetectionConfig", f"{LABS}.vision.detection:DetectionTask"),
    "segmentation": Entry(f"{LABS}.vision.config:SegmentationConfig", f"{LABS}.vision.segmentation:SegmentationTask"),
    "diffusion_unet": Entry(
        f"{LABS}.vision.config:DiffusionUnetConfig", f"{LABS}.vision.diffusion_unet:DiffusionUnetTask"
    ),
}  # fmt: skip
"""Every task by name: a new one is entered here and nowhere else. The core knows labs by these names alone."""

if TYPE_CHECKING:
    TaskConfig: TypeAlias = (
        DigitsConfig
        | DigitsSubsetsConfig
        | Cifar10SubsetsConfig
        | TimmFinetuneConfig
        | ImageNetConfig
        | LanguageConfig
        | SensorsConfig
    )
else:
    TaskConfig = Annotated[
        reduce(or_, (resolve_name(each.config) for each in TASKS.values())), Field(discriminator="name")
    ]
"""Configuration of any task; its literal ``name`` tells which."""

"""Configuration of lottery tickets. Nothing here computes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rpg.section import Section
from rpg.tasks.images.config import DigitsSubsetsConfig


class TicketsConfig(Section):
    """Lottery tickets of a family of tasks: masks of one start, found by training and pruning in turns."""

    name: Literal["tickets"] = "tickets"
    family: DigitsSubsetsConfig = Field(
        DigitsSubsetsConfig(),
        description="tasks, network and training; base.steps: common steps the start is rewound to",
    )
    rounds: int = Field(7, ge=1, description="trainings of a search, after each of which the smallest weights go")
    kept: float = Field(0.6, gt=0, lt=1, description="share of the living weights that each round keeps")
    sparsity: float = Field(0.92, gt=0, lt=1, description="share of zeros of the masks that are compared")

    @model_validator(mode="after")
    def _one_ticket_a_task(self) -> TicketsConfig:
        if self.family.copies != 1 or self.family.finetune.checkpoints != 1:
            raise ValueError("a task has one ticket; set family.copies and family.finetune.checkpoints to 1")
        return self

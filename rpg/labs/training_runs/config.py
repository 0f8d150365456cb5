"""Configuration of training runs. Nothing here computes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rpg.section import Section


class TrainingRunsConfig(Section):
    """Runs on the digits that are kept from their first weights to convergence."""

    name: Literal["training_runs"] = "training_runs"
    seed: int = Field(0, ge=0, description="decides the first weights of every run")
    hidden: int = Field(16, ge=1, description="hidden units of the target network")
    runs: int = Field(1000, ge=1, description="training runs that a generator learns from")
    validation: int = Field(50, ge=1, description="further runs, to make choices by")
    unseen: int = Field(100, ge=1, description="further runs, to report on")
    steps: tuple[int, ...] = Field(
        (0, 1, 2, 3, 5, 7, 10, 14, 20, 28, 40, 56, 80, 112, 160, 200),
        min_length=2,
        description="optimizer steps after which a checkpoint is kept, ascending from 0",
    )
    learning_rate: float = Field(0.1, gt=0, description="of gradient descent on all training images, constant")
    momentum: float = Field(0.9, ge=0, lt=1)
    group: int = Field(50, ge=1, description="runs trained side by side")

    @model_validator(mode="after")
    def _steps_ascend_from_0(self) -> TrainingRunsConfig:
        if self.steps[0] != 0 or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps are {list(self.steps)}; write different numbers, ascending from 0")
        return self

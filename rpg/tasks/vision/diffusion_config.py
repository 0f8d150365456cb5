"""Configuration of the task ``diffusion_unet``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rpg.tasks.vision.stepwise_config import StepwiseConfig


class DiffusionUnetConfig(StepwiseConfig):
    """A diffusion model of the digits, and how its samples are drawn and judged."""

    name: Literal["diffusion_unet"] = "diffusion_unet"
    channels: tuple[int, ...] = Field(
        (32, 64, 64), min_length=1, max_length=4, description="of the U-Net's levels, each half as large as the last"
    )
    layers: int = Field(1, ge=1, description="residual blocks a level")
    groups: int = Field(8, ge=1, description="of the group norms; divides all channels")
    timesteps: int = Field(1000, ge=2, description="noise levels T that the network learns")
    samples: int = Field(250, ge=8, description="images that are drawn, and held-out digits they are compared with")
    sample_steps: int = Field(10, ge=1, description="DDIM steps in which they are drawn, from the same noise each time")

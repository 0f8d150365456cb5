"""Denoisers: the diffusion network over single tokens, one signature for all."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rpg.models.denoiser.base import Denoiser
from rpg.models.denoiser.mlp import MLPConfig, MLPDenoiser
from rpg.models.denoiser.unet1d import UNet1d, UNet1dConfig

DenoiserConfig = Annotated[MLPConfig | UNet1dConfig, Field(discriminator="kind")]

__all__ = ["Denoiser", "DenoiserConfig", "MLPConfig", "UNet1dConfig", "build_denoiser"]


def build_denoiser(config: MLPConfig | UNet1dConfig, token_size: int, d_prototype: int) -> Denoiser:
    """Build the denoiser a configuration describes, randomly initialised from torch's global generator.

    Args:
        config: kind and size.
        token_size: D.
        d_prototype: width of the prototypes, H.
    """
    if isinstance(config, UNet1dConfig):
        return UNet1d(config, token_size, d_prototype)
    return MLPDenoiser(config, token_size, d_prototype)

"""Denoisers: the diffusion network over single tokens, one signature for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from rpg.models.denoiser.base import Denoiser
from rpg.models.denoiser.mlp import MLPConfig, MLPDenoiser
from rpg.models.denoiser.unet1d import UNet1d, UNet1dConfig

DenoiserConfig = Annotated[MLPConfig | UNet1dConfig, Field(discriminator="kind")]

__all__ = ["Denoiser", "DenoiserConfig", "MLPConfig", "UNet1dConfig", "build_denoiser"]

DENOISERS: dict[str, Callable[[Any, int, int], Denoiser]] = {"mlp": MLPDenoiser, "unet1d": UNet1d}


def build_denoiser(config: MLPConfig | UNet1dConfig, token_size: int, d_prototype: int) -> Denoiser:
    """Build the denoiser a configuration describes, randomly initialised from torch's global generator.

    Args:
        config: kind and size.
        token_size: D.
        d_prototype: width of the prototypes, H.
    """
    return DENOISERS[config.kind](config, token_size, d_prototype)

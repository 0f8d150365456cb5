"""Denoisers: the diffusion network over tokens, one signature for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from rpg.models.denoiser.base import (
    Decoder,
    DecoderConfig,
    Denoiser,
    JointConfig,
    JointDenoiser,
    MLPConfig,
    MLPDenoiser,
)
from rpg.models.denoiser.unet1d import UNet1d, UNet1dConfig

DenoiserConfig = Annotated[MLPConfig | UNet1dConfig | JointConfig | DecoderConfig, Field(discriminator="kind")]

__all__ = ["DecoderConfig", "Denoiser", "DenoiserConfig", "JointConfig", "MLPConfig", "UNet1dConfig", "build_denoiser"]

DENOISERS: dict[str, Callable[[Any, int, int, int], Denoiser]] = {
    "mlp": lambda config, token_size, d_prototype, _: MLPDenoiser(config, token_size, d_prototype),
    "unet1d": lambda config, token_size, d_prototype, _: UNet1d(config, token_size, d_prototype),
    "joint": JointDenoiser,
    "decoder": lambda config, token_size, d_prototype, _: Decoder(config, token_size, d_prototype),
}


def build_denoiser(
    config: MLPConfig | UNet1dConfig | JointConfig | DecoderConfig, token_size: int, d_prototype: int, num_tokens: int
) -> Denoiser:
    """Build the denoiser a configuration describes, randomly initialised from torch's global generator.

    Args:
        d_prototype: width of the prototypes, H.
    """
    return DENOISERS[config.kind](config, token_size, d_prototype, num_tokens)

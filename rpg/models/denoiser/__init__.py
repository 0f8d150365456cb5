"""Denoisers: the diffusion network over tokens, one signature for all."""

from __future__ import annotations

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

DENOISERS: dict[str, Any] = {"mlp": MLPDenoiser, "unet1d": UNet1d, "joint": JointDenoiser, "decoder": Decoder}


def build_denoiser(
    config: MLPConfig | UNet1dConfig | JointConfig | DecoderConfig, token_size: int, d_prototype: int, num_tokens: int
) -> Denoiser:
    """Build the denoiser a configuration describes, randomly initialised from torch's global generator."""
    kind = DENOISERS[config.kind]
    made: Denoiser = kind(config, token_size, d_prototype, *([num_tokens] if kind.needs_whole_networks else []))
    return made

"""Denoisers: the diffusion network over single tokens, one signature for all."""

from __future__ import annotations

from rpg.denoiser.base import Denoiser
from rpg.denoiser.mlp import MLPConfig, MLPDenoiser

DenoiserConfig = MLPConfig

__all__ = ["Denoiser", "DenoiserConfig", "MLPConfig", "build_denoiser"]


def build_denoiser(config: MLPConfig, token_size: int, d_prototype: int) -> Denoiser:
    """Build the denoiser a configuration describes, randomly initialised from torch's global generator.

    Args:
        config: kind and size.
        token_size: D.
        d_prototype: width of the prototypes, H.
    """
    return MLPDenoiser(config, token_size, d_prototype)

"""The configuration of sampling."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rpg.section import Section


class GenerateConfig(Section):
    """Sampling."""

    sampler: str | None = Field(None, description="euler or heun (flow); ddpm, ddim or dpm-solver++ (ddpm)")
    steps: int = Field(4, ge=1, description="sampling steps")
    eta: float = Field(0.0, ge=0, le=1, description="DDIM's share of fresh noise")
    guidance_scale: float = Field(1.0, ge=0, description="classifier-free guidance; 1 is none")
    state: Literal["stored", "density", "gaussian", "prior"] = Field(
        "stored",
        description="permutation state: a training run's own; a fresh one from a kernel density of them all, or from a "
        "Gaussian; or from the diffusion over codes (model.state.prior)",
    )
    temperature: float = Field(
        1.0,
        ge=0,
        description="spread of fresh states, of kernel ridge's draws or of SANE's kernels, in that of the zoo",
    )
    tile_tokens: int = Field(512, ge=1, description="tokens computed together; part of what decides the bytes")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the networks")

"""What samples from each kind of model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rpg.generation.config import GenerateConfig
from rpg.generation.pdiff_sampler import CodeSampler, LatentSampler
from rpg.generation.posterior_sampler import PosteriorSampler
from rpg.generation.sampler import TokenSampler
from tokenization.layouts import Layout

Sampler = TokenSampler | LatentSampler | PosteriorSampler
SAMPLERS: dict[str, Callable[[Any, Layout, GenerateConfig], Sampler]] = {
    "recurrent": TokenSampler,
    "pdiff": LatentSampler,
    "kernel_ridge": PosteriorSampler,
    "sane": CodeSampler,
}
"""Samplers by ``model.kind``."""

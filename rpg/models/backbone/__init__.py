"""Backbones: from embedded positions to prototypes, one signature for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from rpg.models.backbone.base import (
    Backbone,
    LSTMBackbone,
    LSTMConfig,
    NoneBackbone,
    NoneConfig,
    TransformerBackbone,
    TransformerConfig,
)
from rpg.models.backbone.mamba2 import Mamba2Backbone, Mamba2Config

BackboneConfig = Annotated[LSTMConfig | Mamba2Config | TransformerConfig | NoneConfig, Field(discriminator="kind")]

__all__ = [
    "Backbone",
    "BackboneConfig",
    "LSTMConfig",
    "Mamba2Config",
    "NoneConfig",
    "TransformerConfig",
    "build_backbone",
]


BACKBONES: dict[str, Callable[[Any], Backbone]] = {
    "lstm": LSTMBackbone,
    "mamba2": Mamba2Backbone,
    "transformer": TransformerBackbone,
    "none": NoneBackbone,
}


def build_backbone(config: LSTMConfig | Mamba2Config | TransformerConfig | NoneConfig) -> Backbone:
    """Build the backbone a configuration describes, randomly initialised from torch's global generator."""
    return BACKBONES[config.kind](config)

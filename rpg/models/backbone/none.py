"""No recurrence: every token's prototype depends on its own position, state and condition alone.

Shape letters: B examples, L tokens of a checkpoint, H model width.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from rpg.models.backbone.base import Backbone, BackboneSection


class NoneConfig(BackboneSection):
    """The control experiment: what does the recurrence earn?"""

    kind: Literal["none"] = "none"
    linear: bool = Field(False, description="One linear layer per token instead of the identity.")


class NoneBackbone(Backbone):
    """The identity, or one linear layer shared by all tokens."""

    def __init__(self, config: NoneConfig) -> None:
        super().__init__(config.d_model)
        self.layer = nn.Linear(config.d_model, config.d_model) if config.linear else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, L, H]`` to ``[B, L, H]``."""
        return self.layer(x)  # [B, L, H]

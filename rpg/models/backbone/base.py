"""What every backbone shares: the signature, the widths and activation checkpointing.

Shape letters: B examples, L tokens of a checkpoint, H model width.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rpg.section import Section


class BackboneSection(Section):
    """The fields every backbone has; ``kind`` and the rest belong to the subclasses."""

    d_model: int = Field(256, ge=1, description="Width of the tokens the backbone reads.")
    checkpointing: bool = Field(
        False, description="Recompute each layer's activations in the backward pass: less memory, more time."
    )

    @property
    def d_output(self) -> int:
        """Width of the prototypes the backbone writes."""
        return self.d_model


class Backbone(nn.Module):
    """A network over the L positions of a checkpoint: position, state and condition in, prototypes out.

    A backbone never sees the weights that are being generated, so that it runs once per generated network.

    Args:
        d_model: width of the input.
        d_output: width of the output; ``d_model`` where it is not given.
        checkpointing: recompute the activations of every layer in the backward pass.
    """

    def __init__(self, d_model: int, d_output: int | None = None, checkpointing: bool = False) -> None:
        super().__init__()
        self.d_model = d_model
        self.d_output = d_model if d_output is None else d_output
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        """Map embedded positions ``[B, L, d_model]`` to prototypes ``[B, L, d_output]``."""
        raise NotImplementedError

    def run_layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Call one layer, keeping only its input for the backward pass if so configured."""
        if self.checkpointing and self.training:
            return checkpoint(layer, x, use_reentrant=False)
        return layer(x)


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

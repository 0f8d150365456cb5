"""LSTM backbone: the fastest on a CPU for checkpoints of some hundred tokens.

The recurrent prototype generator of arXiv 2501.11587 with an LSTM in place of Mamba.
Shape letters: B examples, L tokens of a checkpoint, H model width.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rpg.models.backbone.base import Backbone, BackboneSection


class LSTMConfig(BackboneSection):
    """A stack of unidirectional LSTM layers."""

    kind: Literal["lstm"] = "lstm"
    num_layers: int = Field(2, ge=1, description="Number of LSTM layers.")
    residual: bool = Field(True, description="Add the input of every layer to its output.")
    norm: bool = Field(False, description="Normalise the input of every layer (layer norm).")


def has_bf16_lstm() -> bool:
    """Whether PyTorch has an LSTM in bf16 for this CPU: one that has AVX-512. Elsewhere it runs in fp32."""
    check = getattr(torch.cpu, "_is_avx512_supported", None)
    return bool(check and check())


class LSTMLayer(nn.Module):
    """One LSTM over the tokens, optionally with layer norm before it and a residual connection around it."""

    def __init__(self, d_model: int, residual: bool, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model) if norm else nn.Identity()
        self.lstm = nn.LSTM(d_model, d_model, batch_first=True)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, L, H]`` to ``[B, L, H]``."""
        normed = self.norm(x)
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and not has_bf16_lstm():
            with torch.autocast("cpu", enabled=False):
                y, _ = self.lstm(normed.float())  # [B, L, H]
        else:
            y, _ = self.lstm(normed)  # [B, L, H]
        return x + y if self.residual else y  # [B, L, H]


class LSTMBackbone(Backbone):
    """Prototypes from an LSTM that reads the positions in the checkpoint's order."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config.d_model, checkpointing=config.checkpointing)
        self.layers = nn.ModuleList(
            LSTMLayer(config.d_model, config.residual, config.norm) for _ in range(config.num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, L, H]`` to ``[B, L, H]``."""
        for layer in self.layers:
            x = self.run_layer(layer, x)  # [B, L, H]
        return x

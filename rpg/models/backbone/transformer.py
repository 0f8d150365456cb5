"""Transformer backbone, causal unless told otherwise.

Pre-norm blocks; the positions come with the input, so the blocks add none.
Shape letters: B examples, L tokens of a checkpoint, H model width; A attention heads, K width of a head.
"""

from __future__ import annotations

from typing import Literal

from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.models.backbone.base import Backbone, BackboneSection


class TransformerConfig(BackboneSection):
    """A stack of pre-norm transformer blocks."""

    kind: Literal["transformer"] = "transformer"
    num_layers: int = Field(2, ge=1, description="Number of transformer blocks.")
    num_heads: int = Field(4, ge=1, description="Attention heads; must divide d_model.")
    causal: bool = Field(True, description="Attend to earlier tokens only; false, of a start, to all tokens.")
    expand: int = Field(4, ge=1, description="Hidden width of the feed-forward part, in multiples of d_model.")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TransformerConfig:
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} must divide d_model {self.d_model}")
        return self


class TransformerBlock(nn.Module):
    """Self-attention and a feed-forward part, each behind a layer norm and inside a residual."""

    def __init__(self, d_model: int, num_heads: int, expand: int, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.attention_out = nn.Linear(d_model, d_model)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp_in = nn.Linear(d_model, expand * d_model)
        self.mlp_out = nn.Linear(expand * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, L, H]`` to ``[B, L, H]``."""
        qkv = self.qkv(self.attention_norm(x))  # [B, L, 3H]
        q, k, v = rearrange(qkv, "b l (three a k) -> three b a l k", three=3, a=self.num_heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # [B, A, L, K]
        x = x + self.attention_out(rearrange(y, "b a l k -> b l (a k)"))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))  # [B, L, H]


class TransformerBackbone(Backbone):
    """Prototypes from attention over the positions."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.d_model, checkpointing=config.checkpointing)
        self.layers = nn.ModuleList(
            TransformerBlock(config.d_model, config.num_heads, config.expand, config.causal)
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, L, H]`` to ``[B, L, H]``; if causal, output i depends on the inputs up to i only."""
        for layer in self.layers:
            x = self.run_layer(layer, x)  # [B, L, H]
        return self.norm(x)  # [B, L, H]

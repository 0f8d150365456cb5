"""What every backbone shares, and the two that PyTorch makes: LSTM (the fastest on a CPU) and transformer.

The LSTM is the recurrent prototype generator of arXiv 2501.11587 without Mamba. The transformer is causal unless told
otherwise; its blocks are pre-norm and add no positions, which come with the input.
Shape letters: B examples, L tokens of a checkpoint, H model width; A attention heads, K width of a head."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
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
    """

    def __init__(self, config: BackboneSection) -> None:
        super().__init__()
        self.d_model, self.d_output, self.checkpointing = config.d_model, config.d_output, config.checkpointing

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
        super().__init__(config)
        self.layer = nn.Linear(config.d_model, config.d_model) if config.linear else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, L, H]`` to ``[B, L, H]``."""
        return self.layer(x)  # [B, L, H]


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
        super().__init__(config)
        self.layers = nn.ModuleList(
            LSTMLayer(config.d_model, config.residual, config.norm) for _ in range(config.num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, L, H]`` to ``[B, L, H]``."""
        for layer in self.layers:
            x = self.run_layer(layer, x)  # [B, L, H]
        return x


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
        super().__init__(config)
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

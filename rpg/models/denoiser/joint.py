"""Joint denoiser: the residual MLP, whose blocks also look at the other noisy tokens of the same network.

The published scheme denoises every token by itself, given its prototype; where a condition leaves several networks
possible, tokens may then come from different ones. Attention over the tokens of a network lets them agree, as in a
diffusion transformer (arXiv 2212.09748), at the price of tokens that cannot be denoised apart: training takes all
tokens of a checkpoint, and generation whole networks (``generate.tile_tokens`` of L or more).
Shape letters: N = G·L tokens of G networks, L tokens of a network, D token width, H model width, W denoiser width;
A attention heads.
"""

from __future__ import annotations

from typing import Literal

from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.models.denoiser.base import Block, MLPDenoiser
from rpg.section import Section


class JointConfig(Section):
    """Size of the joint denoiser."""

    kind: Literal["joint"] = "joint"
    width: int = Field(128, ge=1, description="Width of the residual stream.")
    hidden: int = Field(256, ge=1, description="Hidden width of every block.")
    depth: int = Field(3, ge=1, description="Number of residual blocks.")
    num_heads: int = Field(4, ge=1, description="Attention heads; must divide the width.")
    skip: bool = Field(False, description="Add the noisy token times a learned function of the time to the output.")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> JointConfig:
        if self.width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} must divide width {self.width}")
        return self


class JointBlock(Block):
    """Attention over the tokens of a network, then what `Block` does; both with the same modulation."""

    def __init__(self, config: JointConfig, num_tokens: int) -> None:
        super().__init__(config.width, config.hidden)
        self.num_tokens, self.num_heads = num_tokens, config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.attention_out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Map ``[N, W]`` to ``[N, W]``; the modulations are ``[N, W]`` too, ``scale`` around one."""
        y = rearrange(shift + F.layer_norm(x, x.shape[-1:]) * scale, "(g l) w -> g l w", l=self.num_tokens)
        q, k, v = rearrange(self.qkv(y), "g l (three a k) -> three g a l k", three=3, a=self.num_heads)
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "g a l k -> g l (a k)")
        return super().forward(x + gate * self.attention_out(y).flatten(0, 1), shift, scale, gate)


class JointDenoiser(MLPDenoiser):
    """adaLN residual MLP and attention over all tokens of a network.

    Rows are networks one after the other, each with all its tokens in order.
    """

    needs_whole_networks = True

    def __init__(self, config: JointConfig, token_size: int, d_prototype: int, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        super().__init__(config, token_size, d_prototype)

    def build_block(self, config: JointConfig) -> Block:  # type: ignore[override]
        """One of the blocks."""
        return JointBlock(config, self.num_tokens)

    def flops_per_token(self) -> int:
        """FLOPs of one forward call per token, less what is computed once per prototype or per step."""
        width = self.config.width
        return super().flops_per_token() + self.config.depth * (8 * width**2 + 4 * self.num_tokens * width)

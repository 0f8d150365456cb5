"""A diffusion over codes of whole checkpoints: what replaces the Gaussian of fresh permutation states.

Flow matching (arXiv 2210.02747) in the velocity form on vectors ``[B, m]``, given the condition: an adaLN residual MLP
(arXiv 2212.09748). Once it has chosen a code, the tokens that are made from it belong to one network.

Letters: B codes, m code values, W width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.models.denoiser.time import TimeEmbedding
from rpg.section import Section


class CodePriorConfig(Section):
    """The diffusion over codes."""

    width: int = Field(384, ge=1, description="width of its residual stream")
    depth: int = Field(4, ge=1, description="residual blocks")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout in the blocks: zoos are small")
    batch_size: int = Field(192, ge=1, description="codes a training step, over all processes")
    steps: int = Field(30, ge=1, description="sampling steps (Heun)")


class _Block(nn.Module):
    """Modulated layer norm, two linear layers, gate, residual."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        self.hidden = nn.Linear(width, 2 * width)
        self.output = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Map ``[B, W]`` to ``[B, W]`` given ``[B, W]``."""
        shift, scale, gate = self.modulation(context).chunk(3, dim=-1)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        return x + gate * self.output(self.dropout(F.silu(self.hidden(y))))


class CodePrior(nn.Module):
    """Draws codes.

    Args:
        config: its size.
        code_size: m.
        build_condition: makes the encoder of conditions for a width, if there are any.
    """

    def __init__(
        self, config: CodePriorConfig, code_size: int, build_condition: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.code_size = code_size
        self.input = nn.Linear(code_size, config.width)
        self.time = TimeEmbedding(config.width)
        self.condition = None if build_condition is None else build_condition(config.width)
        self.blocks = nn.ModuleList(_Block(config.width, config.dropout) for _ in range(config.depth))
        self.output = nn.Linear(config.width, code_size)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor, time: Tensor, conditions: Tensor | None = None) -> Tensor:
        """The velocity ``[B, m]`` at codes ``[B, m]`` noised to the time ``[B]`` in 0 … 1, given ``[B, C]``."""
        context = self.time(time * 1000)  # [B, W]
        if self.condition is not None:
            context = context + self.condition(conditions)
        context = F.silu(context)
        hidden = self.input(x)
        for block in self.blocks:
            hidden = block(hidden, context)
        return self.output(hidden)

    def loss(self, codes: Tensor, noise: Tensor, time: Tensor, conditions: Tensor | None = None) -> Tensor:
        """Mean squared error of the velocity ``e - z`` over a batch of codes ``[B, m]``, noise alike, time ``[B]``."""
        at = time[:, None]
        velocity = self((1 - at) * codes + at * noise, time, conditions)
        return (velocity.float() - (noise - codes)).square().mean()

    def sample(self, noise: Tensor, conditions: Tensor | None = None) -> Tensor:
        """Codes ``[B, m]`` from standard normal noise, by Heun's method; its last step is Euler's."""
        x = noise
        times = torch.linspace(1, 0, self.config.steps + 1).tolist()
        for now, after in itertools.pairwise(times):
            velocity = self(x, x.new_full((len(x),), now), conditions).float()
            ahead = x + (after - now) * velocity
            if after > 0:
                corrected = self(ahead, x.new_full((len(x),), after), conditions).float()
                ahead = x + (after - now) * (velocity + corrected) / 2
            x = ahead
        return x

"""What every denoiser shares, the default (a residual MLP with adaptive layer norm), and the joint denoiser.

The token goes through a bottleneck (D → width → D), so its cost stays small where the token is wide. It follows
the diffusion head of arXiv 2406.11838 and the adaLN-Zero modulation of arXiv 2212.09748, with one change: the
modulation is a *sum* of a part of the prototype and a part of the time. The former is then computed once per
token, the latter once per sampling step.

`Decoder` is not a diffusion: an MLP of the prototype alone, the deterministic control and the cheapest kind. Where a
condition leaves one right network, there is nothing to draw; noise then only has to be unlearned.
Shape letters: N sampled tokens, D token width, H model width; W denoiser width, M all modulations of a token.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.section import Section


class Denoiser(nn.Module):
    """A diffusion network over tokens, conditioned on the prototype of each.

    Attributes:
        checkpoint_rows: token rows that training recomputes together in the backward pass; None keeps all. Only for
            networks in which rows do not depend on one another in training either.
        needs_whole_networks: whether rows must be all tokens of one network after another.
    """

    checkpoint_rows: int | None = None
    needs_whole_networks: bool = False

    def precompute(self, prototype: Tensor) -> tuple[Tensor, ...]:
        """Compute all that depends on the prototype ``[N, H]`` alone, once for all sampling steps.

        Returns:
            The ``context`` that :meth:`forward` takes: tensors with leading dimension N, so that a chunk of tokens
            is a slice of each.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, time: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """Predict noise, sample or velocity, whichever the objective trains.

        Args:
            x: noisy tokens ``[N, D]``.
            time: ``[N]`` on the scale 0 … 1000; pass a scalar as ``scalar.expand(N)`` and it is embedded only once.
            context: what :meth:`precompute` returned for these tokens.
        """
        raise NotImplementedError


def time_sinusoid(time: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of times ``[N]`` on the scale 0 … 1000 (arXiv 1706.03762, section 3.5): ``[N, E]`` in fp32.

    The width E is even; the longest wavelength is 2π times 10,000.
    """
    index = torch.arange(width // 2, device=time.device, dtype=torch.float32)  # [E/2]
    frequency = torch.exp(index * (-2 * math.log(10_000.0) / width))  # [E/2]
    angle = time.float()[:, None] * frequency  # [N, E/2]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)  # [N, E]


class TimeEmbedding(nn.Module):
    """Sinusoid, of an even width ``d_sinusoid``, and a two-layer MLP."""

    def __init__(self, d_output: int, d_sinusoid: int = 256) -> None:
        super().__init__()
        self.d_sinusoid = d_sinusoid
        self.hidden = nn.Linear(d_sinusoid, d_output)
        self.output = nn.Linear(d_output, d_output)

    def forward(self, time: Tensor) -> Tensor:
        """Embed ``[N]`` on the scale 0 … 1000 as ``[N, d_output]``; ``[1, d_output]`` for an expanded time."""
        # An expanded time (``scalar.expand(N)``, as a sampler passes it) is embedded once, not once per token.
        x = time_sinusoid(time[:1] if time.stride(0) == 0 else time, self.d_sinusoid)  # [N or 1, E]
        return self.output(F.silu(self.hidden(x)))  # [N or 1, d_output]


class MLPConfig(Section):
    """Size of the residual MLP."""

    kind: Literal["mlp"] = "mlp"
    width: int = Field(256, ge=1, description="Width of the residual stream.")
    hidden: int = Field(512, ge=1, description="Hidden width of every block.")
    depth: int = Field(3, ge=1, description="Number of residual blocks.")
    skip: bool = Field(False, description="Add the noisy token times a learned function of the time to the output.")
    checkpoint_rows: int | None = Field(
        None,
        ge=1,
        description="Token rows recomputed together in the backward pass: less memory, more time. Null keeps all.",
    )


class Block(nn.Module):
    """Modulated layer norm, two linear layers, gate, residual."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, width)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Map ``[N, W]`` to ``[N, W]``; the modulations are ``[N, W]`` too, ``scale`` around one."""
        y = F.layer_norm(x, x.shape[-1:])  # [N, W]
        y = torch.addcmul(shift, y, scale)  # [N, W]
        y = self.output(F.silu(self.hidden(y)))  # [N, W]
        return torch.addcmul(x, gate, y)  # [N, W]


class MLPDenoiser(Denoiser):
    """adaLN residual MLP over single tokens."""

    def __init__(self, config: Any, token_size: int, d_prototype: int) -> None:
        super().__init__()
        self.checkpoint_rows = getattr(config, "checkpoint_rows", None)
        self.config = config
        self.token_size = token_size
        # Per block shift, scale and gate; shift and scale once more before the output.
        self.num_modulations = 3 * config.depth + 2
        d_modulation = self.num_modulations * config.width

        self.input = nn.Linear(token_size, config.width)
        self.time = TimeEmbedding(config.width)
        self.time_modulation = nn.Linear(config.width, d_modulation)
        self.prototype_modulation = nn.Linear(d_prototype, d_modulation, bias=False)
        self.blocks = nn.ModuleList(self.build_block(config) for _ in range(config.depth))
        self.output = nn.Linear(config.width, token_size)
        self.time_skip = nn.Linear(config.width, 1) if config.skip else None

        identity = torch.zeros(self.num_modulations, config.width)
        identity[1::3] = 1.0
        self.register_buffer("identity", identity.flatten(), persistent=False)  # [M]: one where the scales are
        self.reset_parameters()

    def build_block(self, config: MLPConfig) -> Block:
        """One of the blocks."""
        return Block(config.width, config.hidden)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise; the untrained network returns zeros (plus the skip, which starts at zero too)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for zero in (self.output, self.time_skip):
            if zero is not None:
                nn.init.zeros_(zero.weight)

    def precompute(self, prototype: Tensor) -> tuple[Tensor, ...]:
        """Compute the prototype's part of all modulations: ``[N, H]`` → a tuple of one ``[N, M]``."""
        return (self.prototype_modulation(F.silu(prototype)),)  # [N, M]

    def forward(self, x: Tensor, time: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """Predict; see :meth:`Denoiser.forward`."""
        embedded = F.silu(self.time(time))  # [N or 1, W]
        (modulation,) = context  # [N, M]
        of_time = self.time_modulation(embedded) + self.identity  # [N or 1, M]
        # Summed when they are needed, piece by piece: [N, M] would not stay in a processor's cache.
        pieces = (each.chunk(self.num_modulations, dim=-1) for each in (modulation, of_time))
        parts = (prototype + time for prototype, time in zip(*pieces, strict=True))  # [N, W] each
        x_t = x
        x = self.input(x)  # [N, W]
        for block in self.blocks:
            x = block(x, *itertools.islice(parts, 3))  # [N, W]
        shift, scale = parts
        x = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), scale)  # [N, W]
        x = self.output(x)  # [N, D]
        if self.time_skip is not None:
            x = x + self.time_skip(embedded) * x_t  # [N, D]
        return x


class DecoderConfig(Section):
    """Size of the decoder."""

    kind: Literal["decoder"] = "decoder"
    width: int = Field(256, ge=1, description="Width of every hidden layer.")
    depth: int = Field(1, ge=0, description="Number of hidden layers; 0 with gated: a linear map.")
    gated: bool = Field(
        False,
        description="Hidden layers multiply two linear maps, one through SiLU (arXiv 2002.05202), in place of a ReLU: "
        "settings that turn weights around, as inverted does, multiply what others do.",
    )


class GatedLinear(nn.Module):
    """``[…, inputs]`` → ``[…, outputs]``: a linear map times another one through SiLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.both = nn.Linear(inputs, 2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        """The product of the two maps."""
        value, gate = self.both(x).chunk(2, -1)
        return value * F.silu(gate)


class Decoder(Denoiser):
    """An MLP of the prototype; it looks at neither noisy tokens nor time, so that it needs ``prediction: sample``."""

    def __init__(self, config: DecoderConfig, token_size: int, d_prototype: int) -> None:
        super().__init__()
        widths = [d_prototype, *[config.width] * config.depth]
        pairs, gated = itertools.pairwise(widths), config.gated
        layers = [GatedLinear(*pair) if gated else nn.Sequential(nn.ReLU(), nn.Linear(*pair)) for pair in pairs]
        between = [] if gated else [nn.ReLU()]
        self.network = nn.Sequential(*layers, *between, nn.Linear(widths[-1], token_size))
        last: Any = self.network[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def precompute(self, prototype: Tensor) -> tuple[Tensor, ...]:
        """All there is to compute: ``[N, H]`` → a tuple of one ``[N, D]``."""
        return (self.network(prototype),)

    def forward(self, x: Tensor, time: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """The same tokens ``[N, D]`` whatever the noise and the time."""
        return context[0]


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

    Where a condition leaves several networks possible, tokens that are denoised apart may come from different ones.
    Attention lets them agree, as in a diffusion transformer (arXiv 2212.09748), at a price: training takes all tokens
    of a checkpoint, and generation whole networks (``generate.tile_tokens`` of L or more).

    Rows are networks one after the other, each with all its tokens in order: N = G·L tokens of G networks; A attention
    heads.
    """

    needs_whole_networks = True

    def __init__(self, config: JointConfig, token_size: int, d_prototype: int, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        super().__init__(config, token_size, d_prototype)

    def build_block(self, config: JointConfig) -> Block:  # type: ignore[override]
        """One of the blocks."""
        return JointBlock(config, self.num_tokens)

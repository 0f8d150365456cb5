"""No diffusion: tokens straight from their prototypes. The deterministic control, and the cheapest kind.

Where a condition leaves one right network, there is nothing to draw; noise then only has to be unlearned.
Shape letters: N sampled tokens, D token width, H model width, W hidden width.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.models.denoiser.base import Denoiser
from rpg.section import Section


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
    """An MLP of the prototype; it looks at neither noisy tokens nor time, so that it needs ``prediction: sample``.

    Args:
        config: its size.
        token_size: D.
        d_prototype: H.
    """

    def __init__(self, config: DecoderConfig, token_size: int, d_prototype: int) -> None:
        super().__init__()
        widths = [d_prototype, *[config.width] * config.depth]
        pairs, gated = itertools.pairwise(widths), config.gated
        layers = [
            GatedLinear(*pair) if gated else nn.Sequential(nn.ReLU(), nn.Linear(*pair)) for pair in pairs
        ]  # fmt: skip
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

    def flops_per_token(self) -> int:
        """None: everything is computed once per prototype."""
        return 0

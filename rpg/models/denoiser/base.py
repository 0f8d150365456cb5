"""What every denoiser shares: the signature.

Shape letters: N sampled tokens, D token width, H model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
        """Compute all that depends on the prototype alone, once for all sampling steps.

        Args:
            prototype: ``[N, H]``.

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

        Returns:
            The prediction ``[N, D]``.
        """
        raise NotImplementedError

    def flops_per_token(self) -> int:
        """FLOPs of one forward call per token, less what is computed once per prototype or per step."""
        raise NotImplementedError


def time_sinusoid(time: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sines and cosines of a time on the scale 0 … 1000 (arXiv 1706.03762, section 3.5).

    Args:
        time: ``[N]``, on the scale 0 … 1000.
        width: E, an even number.
        max_period: the longest wavelength is 2π times this.

    Returns:
        ``[N, E]`` in fp32, the cosines first.
    """
    index = torch.arange(width // 2, device=time.device, dtype=torch.float32)  # [E/2]
    frequency = torch.exp(index * (-2 * math.log(max_period) / width))  # [E/2]
    angle = time.float()[:, None] * frequency  # [N, E/2]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)  # [N, E]


def shared_time(time: Tensor) -> Tensor:
    """Reduce an expanded time (``scalar.expand(N)``, as a sampler passes it) to its one row.

    What follows is then computed once per step and broadcast over the tokens, rather than once per token.

    Args:
        time: ``[N]``.

    Returns:
        ``[1]`` if all entries share one memory location, else ``time`` unchanged.
    """
    return time[:1] if time.stride(0) == 0 else time


class TimeEmbedding(nn.Module):
    """Sinusoid and a two-layer MLP.

    Args:
        d_output: width of the embedding.
        d_sinusoid: width of the sinusoid, even.
    """

    def __init__(self, d_output: int, d_sinusoid: int = 256) -> None:
        super().__init__()
        self.d_sinusoid = d_sinusoid
        self.hidden = nn.Linear(d_sinusoid, d_output)
        self.output = nn.Linear(d_output, d_output)

    def forward(self, time: Tensor) -> Tensor:
        """Embed ``[N]`` on the scale 0 … 1000 as ``[N, d_output]``; ``[1, d_output]`` for an expanded time."""
        x = time_sinusoid(shared_time(time), self.d_sinusoid)  # [N or 1, E]
        return self.output(F.silu(self.hidden(x)))  # [N or 1, d_output]

"""What every denoiser shares: the signature.

Shape letters: N sampled tokens, D token width, H model width.
"""

from __future__ import annotations

from torch import Tensor, nn


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

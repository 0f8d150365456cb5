"""The directions of a zoo, and the way from coefficients to tokens and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.tensor_file import TensorSpec
from tokenization.layout.normalization import TensorSource

BasisKind = Literal["token", "network"]

DIRECTIONS = "basis.directions"
NUMBERS = ("basis.scale", "basis.variance", "basis.kept", "basis.total")

BLOCK_VALUES = 1 << 22
"""Values of directions that are widened to float32 at a time: few enough to stay in the processor's cache."""


def basis_specs(num_tokens: int, num_spectral: int, rank: int, size: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Dtypes and shapes of the tensors of a basis on disk."""
    shapes = ((num_spectral,), (num_spectral, rank), (num_tokens,), (num_tokens,))
    numbers = {name: (torch.float64, shape) for name, shape in zip(NUMBERS, shapes, strict=True)}
    return {DIRECTIONS: (dtype, (num_tokens, rank, size)), **numbers}


@dataclass(frozen=True)
class Basis:
    """k directions for every token.

    Attributes:
        directions: ``[L, k, D]`` under the name `DIRECTIONS`, orthonormal in each spectral token, from a memory map.
        shape: (L, k, D).
        scale: ``[T]`` float64, the root mean square of a token's coefficients over the zoo, by which they are divided.
        variance: ``[T, k]`` float64, along each direction, descending; 0 where the zoo has no further direction.
        kept: ``[L]`` float64, each token's mean squared deviation along the directions.
        total: ``[L]`` float64, each token's mean squared deviation in all directions, kept or not.
    """

    directions: TensorSource
    shape: tuple[int, int, int]
    scale: Tensor
    variance: Tensor
    kept: Tensor
    total: Tensor

    @classmethod
    def read(cls, source: Checkpoint, specs: Mapping[str, TensorSpec]) -> Basis:
        """From a file that has the tensors of `basis_specs`."""
        num_tokens, rank, size = specs[DIRECTIONS][1]
        numbers = (source.flat(name).clone().view(specs[name][1]) for name in NUMBERS)
        return cls(source, (num_tokens, rank, size), *numbers)

    @property
    def kind(self) -> BasisKind:
        """``token``: each token has directions of its own; ``network``: one set, whose parts the tokens hold."""
        return "token" if len(self.scale) == self.shape[0] else "network"

    @property
    def numbers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is stored under `NUMBERS`."""
        return self.scale, self.variance, self.kept, self.total

    @property
    def share(self) -> float:
        """The part of the zoo's variance that the directions hold."""
        total = float(self.total.sum())
        return float(self.kept.sum()) / total if total else 1.0

    @cached_property
    def alive(self) -> Tensor:
        """``[T, k]`` bool: where there is a direction."""
        return self.variance > 0

    def blocks(self, first: int, last: int) -> Iterator[tuple[slice, Tensor]]:
        """Tokens ``first`` to ``last`` in blocks: (which, their directions ``[m, k, D]`` as stored)."""
        _, rank, size = self.shape
        flat = self.directions.flat(DIRECTIONS)
        step = max(1, BLOCK_VALUES // (rank * size))
        for start in range(first, last, step):
            tokens = slice(start, min(start + step, last))
            span = slice(tokens.start * rank * size, tokens.stop * rank * size)
            yield tokens, flat[span].view(-1, rank, size)
            if isinstance(self.directions, Checkpoint):
                self.directions.release(DIRECTIONS, span.start, span.stop)

    def expand(self, coefficients: Tensor, first: int, last: int) -> Iterator[tuple[slice, Tensor]]:
        """Tokens ``first`` to ``last`` from their coefficients, block by block.

        Args:
            coefficients: ``[..., m, k]``, of those tokens; of a network's basis ``[..., 1, k]``, of all of them.

        Yields:
            which tokens, and their rows ``[..., m', D]`` float32, on the coefficients' device. Differentiable.
        """
        scale = self.scale.to(coefficients.device, torch.float32)
        scaled = coefficients.float() * (scale[first:last, None] if self.kind == "token" else scale)
        batch = scaled.flatten(0, -3) if scaled.dim() > 2 else scaled[None]  # [B, m or 1, k]
        for tokens, directions in self.blocks(first, last):
            wide = directions.to(scaled.device, torch.float32)  # [m', k, D]
            own = batch[:, tokens.start - first : tokens.stop - first] if self.kind == "token" else batch
            rows = torch.bmm(own.expand(-1, len(wide), -1).transpose(0, 1), wide).transpose(0, 1)  # [B, m', D]
            yield tokens, rows.reshape(*scaled.shape[:-2], len(wide), -1)

    def project(self, rows: Tensor) -> Tensor:
        """Coefficients ``[T, k]`` float32 of tokens ``[L, D]``: what is orthogonal to all directions is lost."""
        parts = []
        for tokens, directions in self.blocks(0, self.shape[0]):
            parts.append(torch.bmm(directions.float(), rows[tokens].float()[..., None])[..., 0])  # [m, k]
        coefficients = torch.cat(parts)
        if self.kind == "network":
            coefficients = coefficients.sum(0, keepdim=True)
        return coefficients / self.scale.float()[:, None]

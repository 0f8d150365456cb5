"""New codes in closed form: a kernel density of the zoo's, its bandwidth chosen by leave-one-out likelihood.

A Gaussian fitted to the codes puts networks between training runs, where they are bad, and beyond the ends of a run.
Here the r leading directions of a code are drawn around one training checkpoint's, the others from a Gaussian. Kernels
are shrunk towards the mean, so that draws spread exactly as the zoo does (smoothed bootstrap, Silverman 1986, section
6.4.1). r = 0 is the Gaussian.

Letters: n checkpoints, m directions, B draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BANDWIDTHS = tuple(0.02 * 1.6**place for place in range(9))
"""Of a kernel, in the codes' standard deviation; shrunk kernels need less than 1."""
MOST_LEADING, MOST_COMPARED = 64, 500
"""Directions that may have kernels, and checkpoints by which the choice is made, all pairs of them."""


@dataclass(frozen=True)
class CodeDensity:
    """A density over codes.

    Attributes:
        centres: ``[n, m]`` codes, of zero mean and unit variance in every direction.
        directions: ``[m, S]``, by which a code becomes a state.
        mean: ``[S]``, the states' mean.
        leading: r, how many directions have kernels.
        bandwidth: of the kernels.
    """

    centres: Tensor
    directions: Tensor
    mean: Tensor
    leading: int
    bandwidth: float

    @classmethod
    def fit(cls, table: Tensor, *, whitened: bool) -> CodeDensity:
        """Fit to the states ``[n, S]`` of n ≥ 2 checkpoints.

        Args:
            table: the states.
            whitened: whether they are codes already, the direction of the largest variance first.
        """
        mean = table.mean(0)
        centres, directions = table - mean, torch.eye(table.shape[1], device=table.device)
        if not whitened:
            left, lengths, right = torch.linalg.svd(centres, full_matrices=False)
            kept = int((lengths > 1e-5 * lengths[0]).sum())
            centres = left[:, :kept] * len(table) ** 0.5
            directions = lengths[:kept, None] / len(table) ** 0.5 * right[:kept]
        compared = centres[:MOST_COMPARED].double()
        rest = -compared.square().mean(0).flip(0).cumsum(0).flip(0) / 2  # of the directions from each on
        rest = torch.cat([rest, rest.new_zeros(1)])
        best = rest[0].item(), 0, 1.0
        for leading in range(1, min(len(rest) - 1, MOST_LEADING) + 1):
            for bandwidth in BANDWIDTHS:
                score = left_out_likelihood(compared[:, :leading], bandwidth) + rest[leading].item()
                best = max(best, (score, leading, bandwidth))
        return cls(centres, directions, mean, best[1], best[2])

    def draw(self, places: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """States ``[B, S]``.

        Args:
            places: ``[B]`` in 0 … 1: which checkpoint each is drawn around, these sorted by their first direction.
            noise: ``[B, m]`` standard normal.
            temperature: scales the noise.
        """
        num, r = len(self.centres), self.leading
        order = self.centres[:, 0].argsort()
        around = self.centres[order[(places * num).long().clamp(max=num - 1)], :r]
        codes = temperature * noise
        codes[:, :r] = (1 - self.bandwidth**2) ** 0.5 * around + self.bandwidth * codes[:, :r]
        return self.mean + codes @ self.directions


def left_out_likelihood(codes: Tensor, bandwidth: float) -> float:
    """Mean log-likelihood of each of ``[n, r]`` codes under the shrunk kernels of the others, up to r log(2π) / 2."""
    shrink, lengths = (1 - bandwidth**2) ** 0.5, codes.square().sum(1)
    squares = lengths[:, None] + shrink**2 * lengths - 2 * shrink * codes @ codes.T  # distances to shrunk codes
    exponent = (-squares / (2 * bandwidth**2)).fill_diagonal_(-math.inf)
    num, size = codes.shape
    return (torch.logsumexp(exponent, 1).mean() - math.log(num - 1) - size * math.log(bandwidth)).item()

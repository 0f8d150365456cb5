"""Kernel ridge regression of a zoo's tokens on its conditions, everything in closed form.

It is the posterior mean of a Gaussian process (Rasmussen and Williams 2006, equation 2.25) whose outputs share one
kernel over conditions; their covariance, ``Yᵀ A Y / n``, is the likeliest one. Kernel and penalty are chosen by the
leave-one-out error, which needs no refitting (equation 5.12). No files, no trainer.

Letters: n checkpoints, C condition values, M values of a checkpoint (all its tokens), A = (K + penalty I)⁻¹ ``[n, n]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Lengths of the kernel that are tried, in median distances between conditions."""

PENALTIES = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
"""Penalties that are tried; the kernel of a condition with itself is 1."""


def rbf(first: Tensor, second: Tensor, length: float | Tensor) -> Tensor:
    """``exp(-|a - b|² / 2 length²)`` of conditions ``[a, C]`` and ``[b, C]``: ``[a, b]``."""
    return torch.exp(-torch.cdist(first, second).square() / (2 * length**2))


def exact_distances(first: Tensor, second: Tensor) -> Tensor:
    """Euclidean distance of every pair, ``[a, C]`` and ``[b, C]`` → ``[a, b]``; exactly 0 between equal rows.

    From 26 rows on torch's default is a matrix product, whose rounding hides which rows are equal.
    """
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass(frozen=True)
class KernelRidge:
    """A fitted regression of outputs ``[n, M]`` on conditions.

    Attributes:
        conditions: ``[n, C]`` float64, those that were seen.
        length, penalty: as chosen.
        inverse: A, ``[n, n]`` float64.
        error: leave-one-out mean squared error as a part of the outputs' mean square.
        groups: which checkpoints are left out together, ``[n]`` long.
    """

    conditions: Tensor
    length: float
    penalty: float
    inverse: Tensor
    error: float
    groups: Tensor

    @classmethod
    def fit(cls, conditions: Tensor, gram: Tensor, by_condition: bool = False) -> KernelRidge:
        """Choose kernel and penalty by the leave-one-out error.

        Args:
            conditions: ``[n, C]``, of two checkpoints or more.
            gram: ``[n, n]``, ``Y Yᵀ`` of the outputs less their mean.
            by_condition: leave all checkpoints of a condition out at once, for unseen conditions: one that
                was seen with several checkpoints would otherwise be predicted by the others.
        """
        x, gram = conditions.to(torch.float64), gram.to(torch.float64)
        distances = exact_distances(x, x)
        apart = distances[distances > 0]
        unit = float(apart.median()) if len(apart) else 1.0
        total = float(gram.trace())
        groups = condition_groups(x) if by_condition else torch.arange(len(x))
        best: KernelRidge | None = None
        for factor in LENGTHS:
            length = factor * unit
            values, vectors = torch.linalg.eigh(rbf(x, x, length))
            for penalty in PENALTIES:
                inverse = (vectors / (values.clamp(min=0) + penalty)) @ vectors.T
                left_out = _left_out(inverse, groups)
                error = float(((left_out @ gram) * left_out).sum()) / total if total else 0.0
                if best is None or error < best.error:
                    best = cls(x, length, penalty, inverse, error, groups)
        assert best is not None
        return best

    def kernel(self, conditions: Tensor) -> Tensor:
        """Of conditions ``[m, C]`` with those seen, ``[m, n]``; its product with ``A Y`` is the prediction."""
        return rbf(conditions.to(torch.float64), self.conditions, self.length)

    def shares(self, conditions: Tensor) -> Tensor:
        """Weights of the outputs in the predictions for conditions ``[m, C]``, ``[m, n]``."""
        return self.kernel(conditions) @ self.inverse

    def left_out(self) -> Tensor:
        """``[n, n]``: its product with the outputs ``[n, M]`` is these less their prediction without their group."""
        return _left_out(self.inverse, self.groups)

    def variance(self, conditions: Tensor) -> Tensor:
        """Posterior variance of a new checkpoint, ``[m]``: a part of the outputs' covariance, 0 to 1 + penalty."""
        kernel = self.kernel(conditions)
        return (1 + self.penalty - ((kernel @ self.inverse) * kernel).sum(1)).clamp(min=0)


def condition_groups(conditions: Tensor) -> Tensor:
    """Numbers that are the same for checkpoints of one condition: ``[n, C]`` → ``[n]`` long."""
    return conditions.unique(dim=0, return_inverse=True)[1]


def square_root(matrix: Tensor) -> Tensor:
    """The symmetric root of a positive semi-definite matrix ``[n, n]``; eigenvalues below 0 by rounding count as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _left_out(inverse: Tensor, groups: Tensor) -> Tensor:
    """``A_gg⁻¹ A_g`` for the rows of every group g (Rasmussen and Williams 2006, equation 5.12, for one of each)."""
    rows = inverse / inverse.diagonal()[:, None]
    for group in (groups.bincount() > 1).nonzero()[:, 0]:
        members = (groups == group).nonzero()[:, 0]
        rows[members] = torch.linalg.solve(inverse[members][:, members], inverse[members])
    return rows

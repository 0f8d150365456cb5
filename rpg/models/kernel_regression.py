"""Kernel ridge regression of a zoo's tokens on its conditions, everything in closed form, and the generator it makes.

It is the posterior mean of a Gaussian process (Rasmussen and Williams 2006, equation 2.25) whose outputs share one
kernel over conditions; their covariance, ``Yᵀ A Y / n``, is the likeliest one. Kernel and penalty are chosen by the
leave-one-out error, which needs no refitting (equation 5.12). No files, no trainer.

Letters: n checkpoints, G of a batch, C condition values, M values of a checkpoint (all its T tokens of k values),
A = (K + penalty I)⁻¹ ``[n, n]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from rpg.models.conditioning import ConditionConfig, PlainModel, are_new, regression_inputs
from tokenization.layouts import Layout

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


class FittedBuffers(nn.Module):
    """A module whose buffers are fitted rather than trained: in loading they take the shapes of what is loaded."""

    def fill(self, **values: Tensor) -> None:
        """Replace buffers, whatever their shapes were."""
        for name, value in values.items():
            old = getattr(self, name)
            setattr(self, name, value.detach().to(old.device, old.dtype).clone())

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:  # type: ignore[no-untyped-def]
        for name, _ in list(self.named_buffers(recurse=False)):
            if (value := state_dict.get(prefix + name)) is not None:
                self.fill(**{name: value})
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class KernelRidgeConfig(PlainModel):
    """Kernel ridge regression on the condition; kernel and penalty are chosen by leave-one-out."""

    kind: Literal["kernel_ridge"] = "kernel_ridge"
    condition: ConditionConfig = ConditionConfig()

    @property
    def description(self) -> str:
        """What the model is, for the model card."""
        what = "the zoo's Gaussian" if self.condition.kind == "none" else "regression on the condition"
        return f"Kernel ridge: {what}, with draws of the posterior; no network was trained."


class KernelRidgeGenerator(FittedBuffers):
    """The regression as a generator: the posterior of a Gaussian process over a zoo's tokens, given the condition.

    It needs no gradient: it is fitted in seconds at any size, and a diffusion that is no better has learned nothing. A
    network's tokens are the posterior mean, or that and a draw of the posterior, one for all tokens together. Without a
    condition it is the Gaussian with the zoo's mean and covariance. What is fitted are buffers, saved and loaded as
    those of every generator.

    ``condition_size`` is C of the numbers that the regression sees (`regression_inputs`); 0 without a condition.
    """

    conditions: Tensor
    length: Tensor
    penalty: Tensor
    inverse: Tensor
    dual: Tensor
    spread: Tensor

    samplers, num_states = ("posterior",), 1

    @classmethod
    def of_layout(cls, config: KernelRidgeConfig, layout: Layout, num_states: int, condition_size: int) -> Self:
        """Networks of a layout's sizes."""
        return cls(config, layout.num_tokens, layout.token_size, condition_size)

    def __init__(self, config: KernelRidgeConfig, num_tokens: int, token_size: int, condition_size: int = 0) -> None:
        super().__init__()
        self.config = config
        self.condition_size = condition_size
        self.register_buffer("conditions", torch.zeros(0, condition_size))
        self.register_buffer("length", torch.ones((), dtype=torch.float64))
        self.register_buffer("penalty", torch.zeros((), dtype=torch.float64))
        self.register_buffer("inverse", torch.zeros(0, 0, dtype=torch.float64))
        self.register_buffer("dual", torch.zeros(0, num_tokens, token_size))
        self.register_buffer("spread", torch.zeros(0, num_tokens, token_size))

    @torch.no_grad()
    def fit(self, tokens: Tensor, conditions: Tensor | None, weight: Tensor) -> float:
        """Fit to a zoo; returns the leave-one-out error as a part of the zoo's variance (1 without a condition).

        Args:
            tokens: ``[n, T, k]``, of zero mean over the zoo.
            conditions: ``[n, C]`` as they come from a zoo; None without.
            weight: ``[T]``, by which each token's values are multiplied where checkpoints are compared.
        """
        num = len(tokens)
        values = rearrange(tokens, "n l d -> n (l d)").to(torch.float64)
        root = torch.eye(num, dtype=torch.float64)
        error = 1.0
        if conditions is not None:
            inputs = regression_inputs(self.config.condition.kind, conditions, self.condition_size)
            weighted = (tokens.to(torch.float64) * weight.to(torch.float64)[:, None]).flatten(1)
            regression = KernelRidge.fit(inputs, weighted @ weighted.T, are_new(self.config.condition.kind))
            self.fill(
                conditions=regression.conditions,
                length=torch.tensor(regression.length),
                penalty=torch.tensor(regression.penalty),
                inverse=regression.inverse,
                dual=rearrange(regression.inverse @ values, "n (l d) -> n l d", d=tokens.shape[-1]),
            )
            root, error = square_root(regression.inverse), regression.error  # which spans the covariance
        self.fill(spread=rearrange(root @ values / num**0.5, "n (l d) -> n l d", d=tokens.shape[-1]))
        return error

    @property
    def regression(self) -> KernelRidge:
        """The regression on conditions."""
        seen = self.conditions.to(torch.float64)
        return KernelRidge(seen, float(self.length), float(self.penalty), self.inverse, 0.0, torch.arange(len(seen)))

    def posterior(self, conditions: Tensor | None) -> tuple[Tensor, Tensor]:
        """How the mean is made of ``dual``, ``[G, n]``, and the size of a draw, ``[G]``, at conditions ``[G, C]``."""
        if conditions is None or not self.condition_size:
            return self.spread.new_zeros(1, 0), self.spread.new_ones(1)
        inputs = regression_inputs(self.config.condition.kind, conditions, self.condition_size)
        regression = self.regression
        return regression.kernel(inputs).to(self.dual.dtype), regression.variance(inputs).sqrt().to(self.dual.dtype)

    def tokens(self, kernel: Tensor, draws: Tensor, token_ids: Tensor) -> Tensor:
        """Tokens ``[G, N, k]`` of networks, from the kernel ``[G, n]`` that `posterior` gives.

        ``draws`` ``[G, n]`` are standard normal times the size of a draw; zeros for the mean.
        """
        rows = torch.tensordot(draws, self.spread[:, token_ids], 1)
        if self.condition_size:
            rows = rows + torch.tensordot(kernel, self.dual[:, token_ids], 1)
        return rows

"""Kernel ridge as a generator: the posterior of a Gaussian process over a zoo's tokens, given the condition.

It needs no gradient: it is fitted in seconds at any size, and a diffusion that is no better has learned nothing. A
network's tokens are the posterior mean, or that and a draw of the posterior, one for all tokens together. Without a
condition it is the Gaussian with the zoo's mean and covariance.

Letters: n checkpoints, G of a batch, T tokens, k values of a token, C condition values.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from einops import rearrange
from torch import Tensor

from rpg.models.centre import FittedBuffers, StateConfig
from rpg.models.conditioning import ConditionConfig, are_new, regression_inputs
from rpg.models.kernel_regression import KernelRidge, square_root
from rpg.section import Section
from tokenization.layouts import Layout


class KernelRidgeConfig(Section):
    """Kernel ridge regression on the condition; kernel and penalty are chosen by leave-one-out."""

    kind: Literal["kernel_ridge"] = "kernel_ridge"
    condition: ConditionConfig = ConditionConfig()

    state: ClassVar = StateConfig(of="none")
    normalises_batches: ClassVar[bool] = False
    initial: ClassVar[None] = None

    @property
    def description(self) -> str:
        """What the model is, for the model card."""
        what = "the zoo's Gaussian" if self.condition.kind == "none" else "regression on the condition"
        return f"Kernel ridge: {what}, with draws of the posterior; no network was trained."


class KernelRidgeGenerator(FittedBuffers):
    """The fitted regression as buffers, so that it is saved and loaded as every generator is.

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

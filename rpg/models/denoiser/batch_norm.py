"""Batch normalisation (arXiv 1502.03167) without side effects, over the rows of all processes.

Shape letters: N sampled tokens, D token width, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

EPSILON = 1e-5
MOMENTUM = 0.1
"""PyTorch's defaults: what is added to a variance, and how far a step moves the running statistics."""


class BatchNorm(nn.Module):
    """Normalise each channel by its mean and variance over rows and positions.

    In training these are the statistics of the rows at hand, and of those that the other processes of a run hold, so
    that the number of processes changes nothing (PyTorch's ``SyncBatchNorm`` needs CUDA). In evaluation they are the
    running ones, and rows do not depend on one another.

    Unlike PyTorch's module the forward pass moves no running statistics. It returns its own for `track`, so that
    activation checkpointing may run it twice.

    Args:
        num_channels: C.
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels))
        self.bias = nn.Parameter(torch.empty(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_variance", torch.ones(num_channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as a plain normalisation, without statistics of the past."""
        for ones, zeros in ((self.weight, self.bias), (self.running_variance, self.running_mean)):
            ones.fill_(1.0)
            zeros.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Normalise ``[N, C, 1, D]``; also returns mean and unbiased variance ``[C]``, in evaluation None."""
        if not self.training:
            running = (self.running_mean, self.running_variance)
            return F.batch_norm(x, *running, self.weight, self.bias, eps=EPSILON), None
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            return self._over_processes(x)
        # With a momentum of one the kernel leaves the statistics of these rows in the tensors it is given.
        mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_variance)  # [C]
        y = F.batch_norm(x, mean, variance, self.weight, self.bias, training=True, momentum=1.0, eps=EPSILON)
        return y, (mean, variance)

    def _over_processes(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The same over the rows of all processes, which hold equally many each."""
        size = distributed.get_world_size()
        variance, mean = (each.double() for each in torch.var_mean(x.float(), (0, 2, 3), correction=0))  # [C]
        mean, square = _SumOverProcesses.apply(torch.stack([mean, variance + mean.square()])) / size  # [C]
        variance = square - mean.square()  # [C]; float64 bears the difference of large numbers
        scale = (self.weight * (variance + EPSILON).rsqrt()).float()  # [C]
        shift = (self.bias - mean * scale).float()  # [C]
        y = torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(x.dtype)  # [N, C, 1, D]
        count = size * x.numel() / len(mean)
        unbiased = variance.detach() * (count / max(1, count - 1))  # [C]
        return y, (mean.detach().float(), unbiased.float())

    @torch.no_grad()
    def track(self, statistics: tuple[Tensor, Tensor]) -> None:
        """Move the running statistics towards those of one training step."""
        for running, found in zip((self.running_mean, self.running_variance), statistics, strict=True):
            running.lerp_(found, MOMENTUM)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of every process's tensor; each tensor's gradient is the sum of every process's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _SumOverProcesses.forward(ctx, gradient)

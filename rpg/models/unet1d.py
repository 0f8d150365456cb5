"""1-D convolutional denoiser: the paper's (arXiv 2501.11587).

The token is a signal of D samples with one channel. Convolutions with batch normalisation and ELU between them form an
encoder and a decoder with skip connections; before each, the prototype is added to the signal and the time multiplied
into it, position by position. It costs 14 · D · Σ c_in c_out FLOPs a token with the kernel of 7: at D = 16,384 thirty
times what the MLP of configs/large costs.
Shape letters: N sampled tokens, D token width, H model width, E width of the time's sinusoid; C channels.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rpg.models.denoiser import Denoiser, TimeEmbedding
from rpg.section import Odd, Section

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
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_variance", torch.ones(num_channels))

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


class UNet1dConfig(Section):
    """Size of the stack of 1-D convolutions."""

    kind: Literal["unet1d"] = "unet1d"
    channels: tuple[int, ...] = Field(
        (1, 32, 64, 128, 64, 32, 1),
        min_length=3,
        description="Channels between the convolutions, the same backwards; one at both ends.",
    )
    kernel_size: Odd = Field(7, ge=1, description="Width of the kernels, odd.")
    d_time: int = Field(256, ge=2, multiple_of=2, description="Width of the time's sinusoid, even.")
    checkpointing: bool = Field(
        False, description="Recompute each layer in the backward pass: a third of the memory, more time."
    )

    @field_validator("channels")
    @classmethod
    def _mirrored(cls, channels: tuple[int, ...]) -> tuple[int, ...]:
        if channels[0] != 1 or min(channels) < 1 or channels != channels[::-1] or len(channels) % 2 == 0:
            expected = "an odd count of positive numbers with 1 first and last, the same backwards"
            raise ValueError(f"the skip connections need {expected}")
        return channels


class ModulatedConvolution(nn.Module):
    """One layer: modulation, convolution and, except in the last, batch normalisation and ELU."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, last: bool) -> None:
        super().__init__()
        # A two-dimensional convolution of height one, since PyTorch has channels-last kernels for these alone: 1.1 to
        # 1.6 times the speed of conv1d on a CPU, in fp32 and bf16, forward and backward. Only the last has a bias,
        # which a normalisation would take away again.
        self.convolution = nn.Conv2d(c_in, c_out, (1, kernel_size), padding=(0, kernel_size // 2), bias=last)
        self.convolution.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = None if last else BatchNorm(c_out)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Map ``[N, c_in, 1, D]`` to ``[N, c_out, 1, D]``; also returns the batch's statistics, if it has any.

        ``shift`` is ``[N, 1, 1, D]``, ``scale`` the same or ``[1, 1, 1, D]``.
        """
        # Cast so that fp32 modulations do not lift the wide layers out of autocast's precision.
        x = self.convolution(torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype)))  # [N, c_out, 1, D]
        if self.norm is None:
            return x, None
        x, statistics = self.norm(x)
        return F.elu(x, inplace=True), statistics


class UNet1d(Denoiser):
    """Encoder and decoder of 1-D convolutions over the values of a token.

    Of n convolutions the first n / 2 + 1 are the encoder. The outputs of its layers, all but the last two, are added to
    the inputs of the decoder's in reverse order.
    """

    def __init__(self, config: UNet1dConfig, token_size: int, d_prototype: int) -> None:
        super().__init__()
        self.config = config
        self.token_size = token_size
        self.prototype = nn.Linear(d_prototype, token_size)
        self.time = TimeEmbedding(token_size, config.d_time)
        pairs = list(pairwise(config.channels))
        self.layers = nn.ModuleList(
            ModulatedConvolution(c_in, c_out, config.kernel_size, last=index == len(pairs) - 1)
            for index, (c_in, c_out) in enumerate(pairs)
        )

    def precompute(self, prototype: Tensor) -> tuple[Tensor, ...]:
        """Map the prototype to the token's width: ``[N, H]`` → a tuple of one ``[N, D]``."""
        return (self.prototype(prototype),)  # [N, D]

    def forward(self, x: Tensor, time: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """Predict; see :meth:`Denoiser.forward`."""
        scale = self.time(time)[:, None, None]  # [N or 1, 1, 1, D]
        # (x + c) · t in one operation for each layer: c · t + x · t.
        shift = context[0][:, None, None] * scale  # [N, 1, 1, D]
        x = x[:, None, None].to(memory_format=torch.channels_last)  # [N, 1, 1, D]
        num_encoder = len(self.layers) // 2 + 1
        skips: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            if index >= num_encoder:
                x = x + skips.pop()  # [N, C, 1, D]
            x = self._run(layer, x, shift, scale)  # [N, C, 1, D]
            if index < num_encoder - 2:
                skips.append(x)
        return x[:, 0, 0]  # [N, D]

    def _run(self, layer: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """One layer, recomputed in the backward pass if so configured; in training its statistics are kept."""
        if self.config.checkpointing and self.training and torch.is_grad_enabled():
            x, statistics = checkpoint(layer, x, shift, scale, use_reentrant=False, preserve_rng_state=False)
        else:
            x, statistics = layer(x, shift, scale)
        if statistics is not None:
            layer.norm.track(statistics)
        return x

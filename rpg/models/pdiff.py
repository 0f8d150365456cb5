"""p-diff (arXiv 2402.13144): an autoencoder of flattened parameters and diffusion in its latent space.

Both networks are encoder-decoders of five 1-D convolutions and one linear layer each way (section 3.1). No files, no
trainer.

B examples, d values of a flattened checkpoint, P values after padding, Z latent width, C channels, s stride.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.diffusion import DDPMConfig, Objective, ObjectiveConfig, build_objective
from rpg.models.conditioning import ConditionConfig, PlainModel
from rpg.models.denoiser import TimeEmbedding
from rpg.section import Odd, Section
from tokenization.layouts import Layout


class StageConfig(Section):
    """One of the two stages of training; AdamW, the learning rate falls to 0 as a cosine."""

    steps: int = Field(ge=1, description="optimizer steps")
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(50, ge=1, description="checkpoints a step")
    weight_decay: float = Field(0.0, ge=0)


class PDiffConfig(PlainModel):
    """The networks of p-diff and their two stages (defaults of appendix A.1, tables 5c and 5d)."""

    kind: Literal["pdiff"] = "pdiff"
    latent_size: int = Field(128, ge=1, description="width Z of the latent")
    channels: tuple[int, ...] = Field((8, 16, 32, 32, 32), min_length=1, description="of the encoder's convolutions")
    kernel_size: Odd = Field(5, ge=1, description="of all convolutions, odd")
    stride: int = Field(2, ge=1, description="of the autoencoder's convolutions, at most the kernel size")
    parameter_noise: float = Field(1e-3, ge=0, description="σ_v, in units of the normalised parameters")
    latent_noise: float = Field(0.1, ge=0, description="σ_z, in units of the latent before it is standardised")
    variational: bool = Field(False, description="a VAE without diffusion instead (table 8)")
    kl_weight: float = Field(1.0, ge=0, description="of the VAE's divergence; 1 is the evidence bound")
    denoiser_channels: tuple[int, ...] = Field((32, 64, 128, 128, 128), min_length=1, description="of the denoiser")
    diffusion: ObjectiveConfig = DDPMConfig()
    autoencoder: StageConfig = StageConfig(steps=500, learning_rate=2e-5)
    latent: StageConfig = StageConfig(steps=1000, learning_rate=1e-4)

    condition: ClassVar = ConditionConfig()

    @property
    def description(self) -> str:
        """What the model is, for the model card."""
        networks = "variational autoencoder" if self.variational else "autoencoder and latent diffusion"
        return f"p-diff (arXiv 2402.13144): {networks}, latent of {self.latent_size} values."

    @property
    def num_steps(self) -> int:
        """Optimizer steps of both stages; a VAE has no second one."""
        return self.autoencoder.steps + (0 if self.variational else self.latent.steps)


class ConvEncoder(nn.Module):
    """A signal ``[B, d]`` → five strided convolutions → a linear layer → ``[B, outputs]``."""

    def __init__(self, size: int, outputs: int, channels: tuple[int, ...], kernel_size: int, stride: int) -> None:
        super().__init__()
        step = stride ** len(channels)
        self.padded = math.ceil(size / step) * step  # P
        self.convolutions = nn.ModuleList(
            nn.Conv1d(c_in, c_out, kernel_size, stride, kernel_size // 2) for c_in, c_out in pairwise((1, *channels))
        )
        self.linear = nn.Linear(channels[-1] * self.padded // step, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, d]`` → ``[B, outputs]``."""
        x = F.pad(x, (0, self.padded - x.shape[1])).unsqueeze(1)  # [B, 1, P]
        for convolution in self.convolutions:
            x = F.leaky_relu(convolution(x), 0.1)  # [B, C, P / s^i]
        return self.linear(x.flatten(1))


class ConvDecoder(nn.Module):
    """The mirror image: ``[B, Z]`` → a linear layer → five transposed convolutions → ``[B, d]``."""

    def __init__(self, size: int, inputs: int, channels: tuple[int, ...], kernel_size: int, stride: int) -> None:
        super().__init__()
        step = stride ** len(channels)
        self.size = size
        self.deepest = (channels[-1], math.ceil(size / step))
        self.linear = nn.Linear(inputs, math.prod(self.deepest))
        self.convolutions = nn.ModuleList(
            nn.ConvTranspose1d(c_in, c_out, kernel_size, stride, kernel_size // 2, output_padding=stride - 1)
            for c_in, c_out in pairwise((*reversed(channels), 1))
        )

    def forward(self, z: Tensor) -> Tensor:
        """``[B, Z]`` → ``[B, d]``."""
        x = self.linear(z).unflatten(1, self.deepest)  # [B, C, P / s^5]
        for convolution in self.convolutions:
            x = convolution(F.leaky_relu(x, 0.1))  # [B, C, P / s^i]
        return x[:, 0, : self.size]


class LatentDenoiser(nn.Module):
    """1-D convolutional encoder-decoder over the latent as a signal, with skip connections and the time everywhere.

    Each of the encoder's convolutions halves the length; the decoder mirrors them.
    """

    def __init__(self, size: int, channels: tuple[int, ...], kernel_size: int) -> None:
        super().__init__()
        step, d_time = 2 ** len(channels), 128
        self.size = size
        self.padded = math.ceil(size / step) * step
        width = channels[-1] * self.padded // step
        self.time = TimeEmbedding(d_time)
        padding = kernel_size // 2
        self.down = nn.ModuleList(nn.Conv1d(a, b, kernel_size, 2, padding) for a, b in pairwise((1, *channels)))
        self.down_time = nn.ModuleList(nn.Linear(d_time, channel) for channel in channels)
        self.linear = nn.Linear(width, width)
        self.up = nn.ModuleList(
            nn.ConvTranspose1d(a, b, kernel_size, 2, padding, output_padding=1)
            for a, b in pairwise((*reversed(channels), channels[0]))
        )
        self.up_time = nn.ModuleList(nn.Linear(d_time, a) for a in reversed(channels))
        self.output = nn.Linear(channels[0] * self.padded, size)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Predict for noisy latents ``[B, Z]`` at ``time`` ``[B]`` (0 … 1000): ``[B, Z]``."""
        embedded = F.silu(self.time(time))  # [B or 1, d_time]
        hidden = F.pad(x, (0, self.padded - self.size)).unsqueeze(1)  # [B, 1, P]
        skips = []
        for convolution, project in zip(self.down, self.down_time, strict=True):
            hidden = F.silu(convolution(hidden) + project(embedded)[:, :, None])  # [B, C, P / 2^i]
            skips.append(hidden)
        hidden = hidden + self.linear(hidden.flatten(1)).view_as(hidden)
        for convolution, project, skip in zip(self.up, self.up_time, reversed(skips), strict=True):
            hidden = F.silu(convolution(hidden + skip + project(embedded)[:, :, None]))  # [B, C, P / 2^(i-1)]
        return self.output(hidden.flatten(1))


def flatten_tokens(layout: Layout, tokens: Tensor) -> Tensor:
    """Tokens ``[..., L, D]`` → their values without padding, ``[..., d]``."""
    return tokens.flatten(-2)[..., layout.mask.flatten()]


def unflatten_values(layout: Layout, values: Tensor) -> Tensor:
    """Values ``[..., d]`` → tokens ``[..., L, D]``, padding 0."""
    tokens = values.new_zeros(*values.shape[:-1], layout.num_tokens * layout.token_size)
    tokens[..., layout.mask.flatten().to(values.device)] = values
    return tokens.unflatten(-1, (layout.num_tokens, layout.token_size))


class ParameterDiffusion(nn.Module):
    """p-diff's networks, and the statistics by which latents are standardised.

    Unscaled latents have a variance far from the one the noise schedule supposes, so that samples of whole networks
    collapse; the statistics are measured between the two stages by :meth:`measure_latents`.
    """

    latent_mean: Tensor
    latent_std: Tensor
    num_states = 1

    @classmethod
    def of_layout(cls, config: PDiffConfig, layout: Layout, num_states: int, condition_size: int) -> Self:
        """Networks of a layout's sizes."""
        return cls(config, layout.num_coordinates)

    def __init__(self, config: PDiffConfig, num_values: int) -> None:
        super().__init__()
        self.config = config
        self.num_values = num_values
        shape = (config.channels, config.kernel_size, config.stride)
        latent_size = config.latent_size
        self.encoder = ConvEncoder(num_values, latent_size * (2 if config.variational else 1), *shape)
        self.decoder = ConvDecoder(num_values, latent_size, *shape)
        self.denoiser = LatentDenoiser(latent_size, config.denoiser_channels, config.kernel_size)
        self.objective: Objective = build_objective(config.diffusion)
        self.register_buffer("latent_mean", torch.zeros(latent_size))
        self.register_buffer("latent_std", torch.ones(latent_size))

    @property
    def samplers(self) -> tuple[str, ...]:
        """Names of the samplers, the default first."""
        return tuple(self.objective.samplers)

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Parameters ``[B, d]`` → latents ``[B, Z]`` and, of a VAE, their log variance ``[B, Z]``."""
        encoded = self.encoder(values).float()
        if not self.config.variational:
            return encoded, None
        mean, log_variance = encoded.chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 10)

    def autoencoder_loss(self, values: Tensor, parameter_noise: Tensor, latent_noise: Tensor) -> Tensor:
        """Mean squared error a value, encoded and decoded with noise on both sides (equation 5).

        For a VAE it is the negative evidence bound in the same unit (twice, over d).

        Args:
            values: ``[B, d]`` normalised parameters v.
            parameter_noise: ``[B, d]`` standard normal, scaled here by σ_v.
            latent_noise: ``[B, Z]`` standard normal, scaled here by σ_z, or by a VAE's own standard deviation.
        """
        mean, log_variance = self.encode(values + self.config.parameter_noise * parameter_noise)
        scale = self.config.latent_noise if log_variance is None else (log_variance / 2).exp()
        error = (self.decoder(mean + scale * latent_noise).float() - values).square().mean()
        if log_variance is None:
            return error
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return error + self.config.kl_weight * 2 * divergence / self.num_values

    def diffusion_loss(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Mean squared error of the denoiser on standardised latents (equation 6).

        Latents ``[B, Z]`` are as encoded, noise ``[B, Z]`` is standard normal, time ``[B]`` in the objective's unit.
        """
        x0 = (latents - self.latent_mean) / self.latent_std  # [B, Z]
        noisy = self.objective.add_noise(x0, noise, time)
        prediction = self.denoiser(noisy, self.objective.network_time(time)).float()
        error = (prediction - self.objective.target(x0, noise, time)).square().mean(1)  # [B]
        return (error * self.objective.weight(time)).mean()

    @torch.no_grad()
    def measure_latents(self, latents: Tensor) -> None:
        """Take the mean and standard deviation of each latent value over the zoo, ``[K, Z]``."""
        self.latent_mean.copy_(latents.mean(0))
        spread = latents.std(0, correction=0)
        # A value that the encoder leaves alone must not become noise that is as large as the others'.
        self.latent_std.copy_(spread.clamp(min=1e-6 * float(spread.max()) + 1e-12))

    def decode_standardised(self, latents: Tensor) -> Tensor:
        """Standardised latents ``[B, Z]`` → normalised parameters ``[B, d]``."""
        return self.decoder(latents * self.latent_std + self.latent_mean).float()

    def forward(self, stage: int, *inputs: Tensor) -> Tensor:
        """The loss of stage 0, :meth:`autoencoder_loss`, or 1, :meth:`diffusion_loss`."""
        return self.diffusion_loss(*inputs) if stage else self.autoencoder_loss(*inputs)

"""The task ``diffusion_unet``: diffusers' U-Net as a DDPM of scikit-learn's digits, evaluated by its samples.

DDPM (arXiv 2006.11239) with the cosine schedule of arXiv 2102.09672; samples by DDIM (arXiv 2010.02502) from fixed
noise, so that networks can be compared on the same noise. B images of 8×8 pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpg.devices import use_threads
from rpg.labs.vision.config import DiffusionUnetConfig
from rpg.seeding import make_rng
from rpg.tasks.images.config import DIGITS_SIZE
from rpg.tasks.images.digits import load_splits
from rpg.tasks.stepwise import FinetunedTask
from tokenization.errors import InputError

SCHEDULE: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True}


class DiffusionUnetTask(FinetunedTask):
    """Collects zoos of diffusion models and draws samples from state dicts."""

    unrecorded = ("device", "samples", "sample_steps")
    config: DiffusionUnetConfig

    def make_network(self) -> Any:
        """The untrained U-Net. Raises InputError if ``groups`` does not divide its channels."""
        from diffusers import UNet2DModel  # imported here: slow

        levels = len(self.config.channels)
        try:
            return UNet2DModel(
                sample_size=DIGITS_SIZE, in_channels=1, out_channels=1, layers_per_block=self.config.layers,
                block_out_channels=self.config.channels, norm_num_groups=self.config.groups,
                down_block_types=("DownBlock2D",) * levels, up_block_types=("UpBlock2D",) * levels,
            )  # fmt: skip
        except ValueError as error:
            raise InputError(
                f"task.channels {self.config.channels} make no U-Net ({error}); change task.groups"
            ) from None

    def scheduler(self, kind: str = "DDPMScheduler") -> Any:
        """The scheduler of diffusers with this name and the task's noise levels."""
        import diffusers

        return getattr(diffusers, kind)(num_train_timesteps=self.config.timesteps, **SCHEDULE)

    @cached_property
    def _noise(self) -> Any:
        return self.scheduler()

    def images(self, split: str = "test") -> Tensor:
        """The digits of a split in 0 … 1, float32 ``[B, 1, 8, 8]``. Raises InputError if there is no such split."""
        splits = load_splits()
        least, most = splits.images["train"].aminmax()
        return (splits.images[splits.check(split)] - least) / (most - least)

    def batches_after(self, done: int) -> Iterator[Tensor]:
        """Training images in -1 … 1; each step has its own random numbers."""
        images = self.images("train").to(self.device) * 2 - 1
        for step in itertools.count(done):
            rng = make_rng(self.config.seed, "batch", step)
            yield images[torch.randint(len(images), (self.config.batch_size,), generator=rng).to(self.device)]

    def loss(self, network: nn.Module, batch: Tensor, step: int) -> Tensor:
        """Mean squared error of the predicted noise at random noise levels (DDPM's simple objective)."""
        rng = make_rng(self.config.seed, "noise", step)
        noise = torch.randn(batch.shape, generator=rng).to(self.device)
        times = torch.randint(self.config.timesteps, (len(batch),), generator=rng).to(self.device)
        noisy = self._noise.add_noise(batch, noise, times)
        return F.mse_loss(network(noisy, times).sample, noise)

    @torch.inference_mode()
    def samples(self, network: Mapping[str, Tensor], num: int | None = None) -> Tensor:
        """Samples of a network, ``[num, 1, 8, 8]`` in 0 … 1; black where not finite. Raises InputError for a misfit."""
        fitted, drawing = self.network_with(network).eval(), self.scheduler("DDIMScheduler")
        drawing.set_timesteps(self.config.sample_steps)
        rng = make_rng(self.config.seed, "samples")
        images = torch.randn(num or self.config.samples, 1, DIGITS_SIZE, DIGITS_SIZE, generator=rng).to(self.device)
        with use_threads(self.config.threads):
            for time in drawing.timesteps:
                images = drawing.step(fitted(images, time).sample, time, images).prev_sample
        return ((images + 1) / 2).nan_to_num(0.0).clamp(0, 1).cpu()

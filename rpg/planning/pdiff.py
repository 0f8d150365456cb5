"""What p-diff needs. B examples, d values of a flattened checkpoint, Z latent width."""

from __future__ import annotations

import torch
from torch import nn

from rpg.generation.pdiff_sampler import GROUP
from rpg.models.pdiff import ParameterDiffusion
from rpg.planning.estimator import Estimator, StepPart
from rpg.planning.flops import GenerationFlops, count_flops, directions_flops
from rpg.planning.memory import FLOAT_BYTES, GenerationMemory, num_bytes
from rpg.planning.peak import LiveBytes


class PDiffEstimator(Estimator):
    """The needs of p-diff: a step takes whole checkpoints; the autoencoder's are the larger ones of both stages."""

    @property
    def checkpoints_per_step(self) -> int:
        """B of the autoencoder's stage."""
        return self.model.autoencoder.batch_size

    @property
    def rows_per_step(self) -> int:
        """All tokens of B checkpoints."""
        return self.checkpoints_per_step * self.zoo.layout.num_tokens

    @property
    def num_parts(self) -> int:
        """A step is a single batch."""
        return 1

    @property
    def cache_bytes(self) -> int:
        """The flattened zoo is always in memory."""
        return self.zoo.num_checkpoints * self.zoo.layout.num_coordinates * FLOAT_BYTES

    def step_part(self, network: ParameterDiffusion, num_processes: int) -> StepPart:
        """A whole step of the autoencoder: values and their noise ``[B, d]``, the latents' noise ``[B, Z]``."""
        num_examples, num_values = self.checkpoints_per_step, self.zoo.layout.num_coordinates
        inputs = [torch.empty(num_examples, size) for size in (num_values, num_values, network.config.latent_size)]
        return StepPart(lambda: (network(0, *inputs),), num_bytes(inputs))

    def averaged(self, network: ParameterDiffusion) -> nn.Module:
        """The autoencoder keeps its last weights."""
        return network.denoiser

    def sampling_memory(self, network: ParameterDiffusion, weights: int, loading: int) -> GenerationMemory:
        """A tile of whole networks is decoded."""
        layout = self.zoo.layout
        with LiveBytes() as live:
            values = network.decode_standardised(torch.empty(GROUP, network.config.latent_size))  # [GROUP, d]
            del values
        rows = GROUP * layout.num_tokens * layout.token_size * FLOAT_BYTES
        return GenerationMemory(weights=weights, prototypes=0, backbone=0, tile=live.peak + rows, loading=loading)

    def sampling_flops(self, network: ParameterDiffusion, steps: int) -> GenerationFlops:
        """Of the decoder, once a network; of the latent's denoiser, unless a VAE has none."""
        latents = torch.empty(GROUP, network.config.latent_size)
        with count_flops() as decoder:
            network.decode_standardised(latents)
        with count_flops() as step:
            if not network.config.variational:
                network.denoiser(latents, torch.empty(()).expand(GROUP))
        once, each = (counter.get_total_flops() // GROUP for counter in (decoder, step))
        directions = directions_flops(self.zoo.layout)
        return GenerationFlops(0, once, each, 0, directions, once + steps * each + directions)

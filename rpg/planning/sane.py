"""What SANE needs. B examples, L tokens of a checkpoint, D token width, K training checkpoints, Z code width."""

from __future__ import annotations

import torch

from rpg.generation.pdiff_sampler import GROUP
from rpg.models.sane import TokenAutoencoder
from rpg.planning.estimator import Estimator, StepPart
from rpg.planning.flops import GenerationFlops, count_flops, directions_flops
from rpg.planning.memory import FLOAT_BYTES, GenerationMemory, num_bytes
from rpg.planning.peak import LiveBytes


class SaneEstimator(Estimator):
    """The needs of SANE: a step takes two views of whole checkpoints."""

    num_parts = 1

    @property
    def checkpoints_per_step(self) -> int:
        """B."""
        return self.config.train.batch_size

    @property
    def rows_per_step(self) -> int:
        """All tokens of B checkpoints."""
        return self.checkpoints_per_step * self.zoo.layout.num_tokens

    @property
    def cache_bytes(self) -> int:
        """The flattened zoo is always in memory."""
        return self.zoo.num_checkpoints * self.zoo.layout.num_coordinates * FLOAT_BYTES

    def meta_network(self) -> TokenAutoencoder:
        """Without storage; with as many anchors as there are checkpoints."""
        network = super().meta_network()
        network.fill(anchors=network.anchors.new_empty(self.zoo.num_checkpoints, *network.anchors.shape[1:]))
        return network

    def step_part(self, network: TokenAutoencoder, num_processes: int) -> StepPart:
        """A whole step: tokens ``[B, L, D]``, their mask and the noise of two views."""
        layout = self.zoo.layout
        shape = (layout.num_tokens, layout.token_size)
        inputs = [torch.empty(self.checkpoints_per_step, *shape), torch.ones(shape)]
        inputs.append(torch.empty(2, self.checkpoints_per_step, *shape))
        return StepPart(lambda: (network(*inputs),), num_bytes(inputs))

    def sampling_memory(self, network: TokenAutoencoder, weights: int, loading: int) -> GenerationMemory:
        """A tile of whole networks is decoded."""
        with LiveBytes() as live:
            rows = network.decode(torch.empty(GROUP, *network.anchors.shape[1:]))  # [GROUP, L, D]
            del rows
        drawn = 3 * GROUP * network.anchors[0].numel() * FLOAT_BYTES
        return GenerationMemory(weights=weights, prototypes=0, backbone=0, tile=live.peak + drawn, loading=loading)

    def sampling_flops(self, network: TokenAutoencoder, steps: int) -> GenerationFlops:
        """Of the decoder, once a network."""
        with count_flops() as decoder:
            network.decode(torch.empty(1, *network.anchors.shape[1:]))
        once, directions = decoder.get_total_flops(), directions_flops(self.zoo.layout)
        return GenerationFlops(0, 0, 0, once, directions, once + directions)

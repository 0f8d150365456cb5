"""SANE's sampler, and the estimator of its memory and FLOPs.

G networks of a tile, L tokens of a checkpoint, D token width, Z code width of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpg.config import Config
from rpg.generation.request import Request
from rpg.generation.sampler import GROUP, LatentSampler, Tile, WatchTile
from rpg.labs.sane.model import TokenAutoencoder
from rpg.planning.estimator import GenerationFlops, LiveBytes, StepPart, count_flops
from rpg.planning.estimators import WholeNetworksEstimator
from rpg.planning.machine import FLOAT_BYTES, GenerationMemory, num_bytes
from rpg.planning.zoo_summary import ZooSummary
from rpg.seeding import make_rng


class CodeSampler(LatentSampler):
    """Draws codes and decodes them, in tiles of whole networks; ``temperature`` scales the kernels."""

    network: TokenAutoencoder  # type: ignore[assignment]

    def _rows(self, tile: Tile, latents: Tensor) -> Tensor:
        mask = self.layout.mask.to(self.device)  # [L, D]
        return self.network.decode(latents)[: tile.num_networks] * mask

    def latents(self, request: Request, tile: Tile, watch: WatchTile | None = None) -> Tensor:
        """Codes of a tile, padded with networks that are discarded, ``[GROUP, L, Z]``."""
        rngs = [make_rng(request.seed, "codes", tile.network + i) for i in range(GROUP)]
        codes = self.network.draw(*random_numbers(self.network, rngs, request.temperature))
        if watch is not None:
            watch(tile, request.steps - 1, lambda: self._rows(tile, codes))
        return codes


def random_numbers(
    network: TokenAutoencoder, rngs: list[torch.Generator], spread: float = 1.0
) -> tuple[Tensor, Tensor]:
    """What `TokenAutoencoder.draw` takes, ``[G, L, Z]`` each, every network's from its own generator."""
    shape, device = network.anchors.shape[1:], network.anchors.device
    places = torch.stack([torch.rand(shape, generator=rng) for rng in rngs])
    noise = torch.stack([torch.randn(shape, generator=rng) for rng in rngs])
    return places.to(device), spread * noise.to(device)


class SaneEstimator(WholeNetworksEstimator):
    """The needs of SANE: a step takes two views of whole checkpoints."""

    def __init__(self, config: Config, zoo: ZooSummary) -> None:
        super().__init__(config, zoo, config.train.batch_size)

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

    def sampling_memory(self, network: TokenAutoencoder, weights: int) -> GenerationMemory:
        """A tile of whole networks is decoded."""
        with LiveBytes() as live:
            network.decode(torch.empty(GROUP, *network.anchors.shape[1:]))  # [GROUP, L, D]
        drawn = 3 * GROUP * network.anchors[0].numel() * FLOAT_BYTES
        return GenerationMemory(weights, tile=live.peak + drawn)

    def sampling_flops(self, network: TokenAutoencoder, steps: int) -> GenerationFlops:
        """Of the decoder, once a network."""
        with count_flops() as decoder:
            network.decode(torch.empty(1, *network.anchors.shape[1:]))
        once = decoder.get_total_flops()
        return GenerationFlops(0, 0, 0, once, once)

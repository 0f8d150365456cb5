"""From a request to tokens by SANE: draws around the anchors' codes → decoder → tokens.

G networks of a tile, L tokens of a checkpoint, D token width, Z code width of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpg.generation.config import GenerateConfig
from rpg.generation.pdiff_sampler import GROUP, LatentSampler
from rpg.generation.request import Request
from rpg.generation.sampler import Tile, Watch
from rpg.models.sane import TokenAutoencoder
from rpg.seeding import make_rng
from tokenization.layouts import Layout


class CodeSampler(LatentSampler):
    """Draws codes and decodes them, in tiles of whole networks; ``temperature`` scales the kernels.

    Args:
        network: the networks with their anchors, in evaluation mode.
        layout: of the checkpoints.
        settings: in which precision.
    """

    network: TokenAutoencoder  # type: ignore[assignment]

    def __init__(self, network: TokenAutoencoder, layout: Layout, settings: GenerateConfig) -> None:
        self.network, self.layout, self.bf16 = network, layout, settings.precision == "bf16"
        self.device = network.anchors.device

    def _rows(self, tile: Tile, latents: Tensor) -> Tensor:
        mask = self.layout.mask.to(self.device)  # [L, D]
        return self.network.decode(latents)[: tile.num_networks] * mask

    def latents(self, request: Request, tile: Tile, watch: Watch | None = None) -> Tensor:
        """Codes of a tile, filled up with networks that nobody asked for, ``[GROUP, L, Z]``."""
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

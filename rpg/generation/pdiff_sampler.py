"""From a request to tokens by p-diff: noise → latents → decoder → values → tokens.

G networks of a tile, L tokens of a checkpoint, D token width, d values of a flattened checkpoint, Z latent width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rpg.generation.config import GenerateConfig
from rpg.generation.request import Request
from rpg.generation.sampler import Partition, Tile, WatchTile, inference
from rpg.models.pdiff import ParameterDiffusion
from rpg.models.sane import TokenAutoencoder
from rpg.seeding import make_rng
from tokenization.layouts import Layout

GROUP = 16
"""Networks computed together; part of what decides the bytes."""


def flatten_tokens(layout: Layout, tokens: Tensor) -> Tensor:
    """Tokens ``[..., L, D]`` → their values without padding, ``[..., d]``."""
    return tokens.flatten(-2)[..., layout.mask.flatten()]


def unflatten_values(layout: Layout, values: Tensor) -> Tensor:
    """Values ``[..., d]`` → tokens ``[..., L, D]``, padding 0."""
    tokens = values.new_zeros(*values.shape[:-1], layout.num_tokens * layout.token_size)
    tokens[..., layout.mask.flatten().to(values.device)] = values
    return tokens.unflatten(-1, (layout.num_tokens, layout.token_size))


class LatentSampler:
    """Samples latents and decodes them, in tiles of whole networks.

    Args:
        network: the networks, in evaluation mode.
        layout: of the checkpoints.
        settings: in which precision.
    """

    def __init__(self, network: ParameterDiffusion, layout: Layout, settings: GenerateConfig) -> None:
        self.network, self.layout, self.bf16 = network, layout, settings.precision == "bf16"
        self.device = network.latent_mean.device

    def tiles(self, num: int, partition: Partition | None = None) -> Iterator[Tile]:
        """The tiles of ``num`` networks; each process takes whole ones."""
        partition = partition or Partition()
        for first in range(0, num, GROUP):
            if partition.takes(first // GROUP):
                yield Tile(first, min(GROUP, num - first), 0, self.layout.num_tokens)

    def shared(self, num: int, partition: Partition) -> range:
        """The networks that several processes compute together: none."""
        return range(0)

    def asked(self, num: int, seed: int) -> list[int]:
        """No network is asked to be a checkpoint: there are no states."""
        return []

    def sample(
        self, request: Request, watch: WatchTile | None = None, partition: Partition | None = None
    ) -> Iterator[tuple[Tile, Tensor]]:
        """Yield each tile of ``partition`` with its rows ``[G, L, D]``; ``watch`` is told after every step."""
        for tile in self.tiles(request.num, partition):
            with inference(self.device, self.bf16):
                rows = self._rows(tile, self.latents(request, tile, watch))
            yield tile, rows

    def _rows(self, tile: Tile, latents: Tensor) -> Tensor:
        values = self.network.decode_standardised(latents)  # [GROUP, d]
        return unflatten_values(self.layout, values[: tile.num_networks])

    def latents(self, request: Request, tile: Tile, watch: WatchTile | None = None) -> Tensor:
        """Standardised latents of a tile, filled up with networks that nobody asked for, ``[GROUP, Z]``."""
        rng = make_rng(request.seed, "tile", tile.network, 0, device=self.device)
        noise = torch.randn(GROUP, self.network.config.latent_size, generator=rng, device=self.device)
        if self.network.config.variational:
            return noise

        def predict(x: Tensor, time: Tensor) -> Tensor:
            return self.network.denoiser(x, time.expand(len(x))).float()

        def tell(step: int, x: Tensor) -> None:
            if watch is not None:
                watch(tile, step, lambda: self._rows(tile, x))

        return self.network.objective.sample(
            predict,
            noise,
            sampler=request.sampler,
            num_steps=request.steps,
            generator=rng,
            eta=request.eta,
            callback=tell,
        )


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

    def latents(self, request: Request, tile: Tile, watch: WatchTile | None = None) -> Tensor:
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

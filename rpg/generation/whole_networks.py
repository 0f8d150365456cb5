"""Samplers of whole networks: p-diff's latents through its decoder, and kernel ridge's mean with a draw around it.

G networks of a tile, L tokens of a checkpoint, D token width, d values of a flattened checkpoint, Z latent width, n
checkpoints that were seen, k values of a token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rpg.config import GenerateConfig
from rpg.generation.request import Request
from rpg.generation.sampler import Tile, TiledSampler, WatchTile
from rpg.models.kernel_regression import KernelRidgeGenerator
from rpg.models.pdiff import ParameterDiffusion
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


class LatentSampler(TiledSampler):
    """Samples latents and decodes them, in tiles of whole networks."""

    def __init__(self, network: ParameterDiffusion, layout: Layout, settings: GenerateConfig) -> None:
        super().__init__(layout, GROUP * layout.num_tokens)
        self.network, self.bf16 = network, settings.precision == "bf16"
        self.device = next(network.buffers()).device

    def rows(self, request: Request, tile: Tile, watch: WatchTile | None) -> Tensor:
        """The rows ``[G, L, D]`` that a tile's latents are decoded to."""
        return self._rows(tile, self.latents(request, tile, watch))

    def _rows(self, tile: Tile, latents: Tensor) -> Tensor:
        values = self.network.decode_standardised(latents)  # [GROUP, d]
        return unflatten_values(self.layout, values[: tile.num_networks])

    def latents(self, request: Request, tile: Tile, watch: WatchTile | None = None) -> Tensor:
        """Standardised latents of a tile, padded with networks that are discarded, ``[GROUP, Z]``."""
        rng = make_rng(request.seed, "tile", tile.network, 0, device=self.device)
        noise = torch.randn(GROUP, self.network.config.latent_size, generator=rng, device=self.device)
        if self.network.config.variational:
            return noise

        def predict(x: Tensor, time: Tensor) -> Tensor:
            return self.network.denoiser(x, time.expand(len(x))).float()

        def tell(step: int, x: Tensor) -> None:
            if watch is not None:
                watch(tile, step, lambda: self._rows(tile, x))

        how: Any = {"sampler": request.sampler, "num_steps": request.steps, "eta": request.eta}
        return self.network.objective.sample(predict, noise, generator=rng, callback=tell, **how)


class PosteriorSampler(TiledSampler):
    """Computes tokens tile by tile; ``temperature`` scales the draw, 0 gives the mean."""

    def __init__(self, network: KernelRidgeGenerator, layout: Layout, settings: GenerateConfig) -> None:
        super().__init__(layout, settings.tile_tokens)
        self.network = network
        self.device = network.spread.device

    def rows(self, request: Request, tile: Tile, watch: WatchTile | None) -> Tensor:
        """The rows ``[G, n, k]`` of a tile; ``watch`` is told once."""
        rows = self.fewest(request, tile, partial(self._rows, request, tile))[: tile.num_networks, : tile.num_tokens]
        if watch is not None:
            watch(tile, request.steps - 1, lambda: rows)
        return rows

    def _rows(self, request: Request, tile: Tile, num: int) -> Tensor:
        group = self.group(request, tile.network, num)
        conditions = None if request.conditions is None else request.conditions[group].to(self.device)
        kernel, size = self.network.posterior(conditions)
        draws = torch.stack(
            [torch.randn(len(self.network.spread), generator=make_rng(request.seed, "posterior", i)) for i in group]
        ).to(self.device)
        ids = self.token_ids(tile)
        rows = self.network.tokens(kernel, request.temperature * size[:, None] * draws, ids.to(self.device))
        return rows * self.layout.mask_rows(ids).to(self.device)

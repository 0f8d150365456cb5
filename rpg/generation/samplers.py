"""What samples from each kind of model, and the sampler of kernel ridge: the posterior mean, and a draw around it.

G networks of a tile, n checkpoints that were seen, T tokens, k values of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rpg.generation.config import GenerateConfig
from rpg.generation.pdiff_sampler import CodeSampler, LatentSampler
from rpg.generation.request import Request
from rpg.generation.sampler import Partition, Tile, TiledSampler, TokenSampler, WatchTile, inference
from rpg.models.kernel_ridge import KernelRidgeGenerator
from rpg.seeding import make_rng
from tokenization.layouts import Layout


class PosteriorSampler(TiledSampler):
    """Computes tokens tile by tile; ``temperature`` scales the draw, 0 gives the mean.

    Args:
        network: the fitted regression.
        layout: of the checkpoints.
        settings: how many tokens are computed together.
    """

    def __init__(self, network: KernelRidgeGenerator, layout: Layout, settings: GenerateConfig) -> None:
        super().__init__(layout, settings.tile_tokens)
        self.network = network
        self.device = network.spread.device

    def sample(
        self, request: Request, watch: WatchTile | None = None, partition: Partition | None = None
    ) -> Iterator[tuple[Tile, Tensor]]:
        """Yield each tile of ``partition`` with its rows ``[G, n, k]``; ``watch`` is told once."""
        for tile in self.tiles(request.num, partition):
            with inference(self.device, bf16=False):
                rows = self.fewest(request, tile, partial(self._rows, request, tile))
            rows = rows[: tile.num_networks, : tile.num_tokens]
            if watch is not None:
                watch(tile, request.steps - 1, lambda rows=rows: rows)  # type: ignore[misc]
            yield tile, rows

    def asked(self, num: int, seed: int) -> list[int]:
        """None: a draw of the posterior is not a checkpoint's."""
        return []

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


Sampler = TokenSampler | LatentSampler | PosteriorSampler
SAMPLERS: dict[str, Callable[[Any, Layout, GenerateConfig], Sampler]] = {
    "recurrent": TokenSampler,
    "pdiff": LatentSampler,
    "kernel_ridge": PosteriorSampler,
    "sane": CodeSampler,
}
"""Samplers by ``model.kind``."""

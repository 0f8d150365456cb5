"""From a request to denoised tokens, tile by tile.

A tile is computed in one shape whatever is asked, from random numbers of its own: same seed, same configuration, same
device type → same bytes, however many networks are asked for and wherever its neighbours are computed.

G networks of a tile, L tokens of a checkpoint, D token width, H model width; d values of a flattened
checkpoint, Z latent width, n checkpoints that were seen, k values of a token.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rpg.config import GenerateConfig
from rpg.devices import Partition
from rpg.generation.request import Request
from rpg.models.kernel_regression import KernelRidgeGenerator
from rpg.models.pdiff import ParameterDiffusion, unflatten_values
from rpg.models.recurrent_diffusion import RecurrentDiffusion
from rpg.models.states import NewStates, stored_states
from rpg.seeding import make_rng
from tokenization.errors import InputError
from tokenization.layouts import Layout


@dataclass(frozen=True)
class Tile:
    """Tokens that are computed together: networks ``network``… and tokens ``token``… of each."""

    network: int
    num_networks: int
    token: int
    num_tokens: int


@dataclass(frozen=True)
class _Inputs:
    """Of a tile's networks: prototypes ``[G or 1, L, H]``, with the condition and, under guidance, without; and what is
    known of their tokens in closed form, ``[G or 1, L, D]``, if anything is."""

    prototypes: list[Tensor]
    known: Tensor | None


FEW = 4
"""A tile with less than this part of its networks wanted is worth a look at whether fewer rows give the same bits."""

GROUP = 16
"""Networks of p-diff computed together; part of what decides the bytes."""

COMPANY = 4
"""Prototypes that are made at once at least: a backbone may round one alone otherwise, and they cost little."""

WatchTile = Callable[[Tile, int, Callable[[], Tensor]], None]
"""Told of a tile, the step just taken and how to get the rows ``[G, n, D]`` as they are then, noise included.

The rows are a function because p-diff has to decode them: most of a thousand steps are not looked at.
"""


class TiledSampler:
    """How generation is cut into tiles, for every model; a kind adds the `rows` of one."""

    device: torch.device
    bf16 = False

    def __init__(self, layout: Layout, tile_tokens: int) -> None:
        self.layout, self.tile_tokens = layout, tile_tokens
        self._same: dict[tuple[object, ...], bool] = {}

    def tiles(self, num: int, partition: Partition | None = None) -> Iterator[Tile]:
        """The tiles of ``num`` networks: several whole networks side by side, or parts of one larger than a tile.

        Of several processes each takes whole networks; those that are left over are split tile by tile (`shared`).
        """
        partition = partition or Partition()
        length, size, group = self.layout.num_tokens, self.tile_tokens, self.group_size()
        shared = self.shared(num, partition)
        for network in range(0, num, group):
            for number, token in enumerate(range(0, length, size if group == 1 else length)):
                if partition.takes(number if network in shared else network // group):
                    yield Tile(network, min(group, num - network), token, min(size, length - token))

    def sample(
        self, request: Request, watch: WatchTile | None = None, partition: Partition | None = None
    ) -> Iterator[tuple[Tile, Tensor]]:
        """Yield each tile of ``partition`` with its rows ``[G, n, D]``; ``watch`` is told after every step."""
        for tile in self.tiles(request.num, partition):
            with inference(self.device, self.bf16):
                rows = self.rows(request, tile, watch)
            yield tile, rows

    def rows(self, request: Request, tile: Tile, watch: WatchTile | None) -> Tensor:
        """The rows ``[G, n, D]`` of a tile."""
        raise NotImplementedError

    def shared(self, num: int, partition: Partition) -> range:
        """The networks that several processes compute together."""
        if partition.whole or self.tile_tokens >= self.layout.num_tokens:
            return range(0)
        return range(num // partition.size * partition.size, num)

    def asked(self, num: int, seed: int) -> list[int]:
        """Which checkpoint each network of a seed is asked to be; none where states are not those of checkpoints."""
        return []

    def group_size(self) -> int:
        """G: networks of a tile."""
        return max(1, self.tile_tokens // self.layout.num_tokens)

    def group(self, request: Request, first: int, num: int | None = None) -> list[int]:
        """The networks of the tile that begins with network ``first``, the last one repeated.

        There are as many as a full tile has, or ``num``: what is computed must not depend on ``request.num``.
        """
        return [min(first + i, request.num - 1) for i in range(num or self.group_size())]

    def fewest(self, request: Request, tile: Tile, compute: Callable[[int], Tensor]) -> Tensor:
        """The rows ``[G', n, D]`` of a tile, computed with no more networks beside its own than their bits take.

        A matrix product of few rows may round differently from one of many, and a sampler may draw for all of them. So
        a number of networks is first computed beside the full tile, and is enough from then on if its bits are the
        same. ``compute`` makes the rows of the first G' networks.
        """
        full, num = self.group_size(), tile.num_networks
        if num * FEW > full:
            return compute(full)
        how = (request.sampler, request.eta > 0, request.guidance_scale == 1, torch.get_num_threads())
        counts = [1 << power for power in range((num - 1).bit_length(), (full // FEW).bit_length())]
        for count in counts:
            if self._same.get((count, how)):
                return compute(count)
        whole = compute(full)
        for count in counts:
            self._same[count, how] = torch.equal(compute(count)[:num], whole[:num])
            if self._same[count, how]:
                break
        return whole

    def token_ids(self, tile: Tile) -> Tensor:
        """The tokens of a tile, ``[n]`` long; a short last tile repeats its last token, so that all have one shape."""
        length = self.layout.num_tokens
        num_tokens = length if self.group_size() > 1 else min(self.tile_tokens, length)
        return torch.arange(tile.token, tile.token + num_tokens).clamp(max=length - 1)


class TokenSampler(TiledSampler):
    """Denoises tokens tile by tile, by networks in evaluation mode."""

    def __init__(self, network: RecurrentDiffusion, layout: Layout, settings: GenerateConfig) -> None:
        super().__init__(layout, settings.tile_tokens)
        check_tiles(network, layout, settings)
        self.bf16 = settings.precision == "bf16"
        self._last: tuple[object, _Inputs] | None = None
        self.network = network = low_precision_copy(network) if self.bf16 else network
        self.states = None
        if network.state is not None:
            self.states = NewStates(network.config.state, network.state, network.prior)
        self.device = network.position_embedding.device

    def sample(
        self, request: Request, watch: WatchTile | None = None, partition: Partition | None = None
    ) -> Iterator[tuple[Tile, Tensor]]:
        """Yield each tile of ``partition`` with its denoised rows ``[G, n, D]``; ``watch`` is told after every step."""
        inputs: _Inputs | None = None
        current = -1
        for tile in self.tiles(request.num, partition):
            with inference(self.device, self.bf16):
                if watch is None and self.group_size() > 1:
                    rows = self.fewest(request, tile, partial(self._of_networks, request, tile))
                else:
                    if inputs is None or tile.network != current:
                        inputs, current = self._inputs(request, tile.network), tile.network
                    rows = self._sample_tile(request, tile, inputs, watch)
            yield tile, rows[: tile.num_networks, : tile.num_tokens]

    def asked(self, num: int, seed: int) -> list[int]:
        """The stored state of each network of a seed, where states are of checkpoints."""
        of_checkpoints = self.network.config.state.of not in ("none", "run")
        return stored_states(seed, range(num), self.network.num_states) if of_checkpoints else []

    def _of_networks(self, request: Request, tile: Tile, num: int) -> Tensor:
        made, given = max(num, COMPANY), request.conditions
        key: object = None  # of inputs that the condition alone decides; subclasses of tensors may hold no values
        if type(given) in (Tensor, type(None)) and self.network.num_states <= 1 and request.initial is None:
            asked = b"" if given is None else given[self.group(request, tile.network, made)].numpy().tobytes()
            key = made, asked, request.guidance_scale == 1, torch.get_num_threads()
        if key is None or self._last is None or self._last[0] != key:
            self._last = key, self._inputs(request, tile.network, made)
        return self._sample_tile(request, tile, self._last[1], num=num)

    def _inputs(self, request: Request, first: int, num: int | None = None) -> _Inputs:
        """What the tile's networks, or its first ``num``, are made from."""
        group = self.group(request, first, num)
        conditions = None if request.conditions is None else request.conditions[group].to(self.device)
        vectors = None
        if self.states is not None:
            vectors = self.states.draw(request.state, request.seed, group, request.temperature, conditions)
        initial = None if request.initial is None else request.initial[group].to(self.device)
        tokens = torch.arange(self.layout.num_tokens, device=self.device)
        known = self.network.known(vectors, conditions, tokens, initial)
        if conditions is None:
            return _Inputs([self.network.prototypes(vectors, initial=initial)], known)
        kept = torch.zeros(len(group), dtype=torch.bool, device=self.device)
        withheld = (kept,) if request.guidance_scale == 1 else (kept, ~kept)
        return _Inputs([self.network.prototypes(vectors, conditions, drop, initial) for drop in withheld], known)

    def _sample_tile(
        self, request: Request, tile: Tile, inputs: _Inputs, watch: WatchTile | None = None, num: int | None = None
    ) -> Tensor:
        """Denoise one tile, padded to its full shape or to ``num`` networks: ``[G, n, D]``."""
        group, width, token_ids = num or self.group_size(), self.layout.token_size, self.token_ids(tile)
        num_tokens, network = len(token_ids), self.network
        rng = make_rng(request.seed, "tile", tile.network, tile.token, device=self.device)
        noise = first_of_normal(group * num_tokens, self.group_size() * num_tokens, width, rng)
        mask = self._mask(token_ids, group)
        contexts = []
        for each in inputs.prototypes:
            rows = each[:group, token_ids.to(self.device)].expand(group, -1, -1).reshape(group * num_tokens, -1)
            contexts.append(network.denoiser.precompute(rows))

        def predict(x: Tensor, time: Tensor) -> Tensor:
            times = time.expand(len(x))
            prediction = network.predict(x, times, contexts[0], mask)
            if len(contexts) == 1:
                return prediction
            return torch.lerp(network.predict(x, times, contexts[1], mask), prediction, request.guidance_scale)

        def whole(x: Tensor) -> Tensor:
            rows = _masked(x, mask).view(group, num_tokens, width)
            if network.centre is None or inputs.known is None:
                return rows
            ids = token_ids.to(self.device)
            return network.centre.complete(rows, inputs.known[:group, ids], ids)

        def tell(step: int, x: Tensor) -> None:
            if watch is not None:
                watch(tile, step, lambda: whole(x)[: tile.num_networks, : tile.num_tokens])

        how: Any = {"sampler": request.sampler, "num_steps": request.steps, "eta": request.eta}
        return whole(network.objective.sample(predict, _masked(noise, mask), generator=rng, callback=tell, **how))

    def _mask(self, token_ids: Tensor, group: int) -> Tensor | None:
        """1 where the rows hold values, ``[G·n, D]``; None without padding, the usual case in a large network."""
        mask = self.layout.mask_rows(token_ids)
        return None if bool(mask.all()) else mask.to(self.device, torch.float32).repeat(group, 1)


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


def check_tiles(network: RecurrentDiffusion, layout: Layout, settings: GenerateConfig) -> None:
    """Raise InputError if tiles would cut networks whose tokens are denoised together."""
    if network.denoiser.needs_whole_networks and settings.tile_tokens < layout.num_tokens:
        raise InputError(
            f"the joint denoiser looks at all {layout.num_tokens} tokens of a network at once, but "
            f"generate.tile_tokens is {settings.tile_tokens}; raise it to that"
        )


@contextlib.contextmanager
def inference(device: torch.device, bf16: bool) -> Iterator[None]:
    """No gradients, and bf16 where it is asked for; enter it for each tile anew.

    It must not span a generator's yields: leaving inference mode takes autocast away for good.
    """
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        yield


def first_of_normal(rows: int, total: int, width: int, rng: torch.Generator) -> Tensor:
    """The first ``rows`` of ``torch.randn(total, width)``, on the generator's device.

    On a CPU the first values of many are those of few as long as these are a multiple of 16 (PyTorch fills so many at a
    time); elsewhere all are drawn.
    """
    num = -(-rows * width // 16) * 16
    if rng.device.type != "cpu" or num >= total * width:
        return torch.randn(total, width, generator=rng, device=rng.device)[:rows]
    return torch.randn(num, generator=rng)[: rows * width].view(rows, width)


def _masked(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows * mask


def low_precision_copy(network: RecurrentDiffusion) -> RecurrentDiffusion:
    """The network with the weights of its matrix products in bf16; everything else is shared with the original.

    Autocast would round these weights anew at every step, since it keeps only what needs a gradient.
    """
    kept: dict[int, nn.Parameter | Tensor] = {id(each): each for each in (*network.parameters(), *network.buffers())}
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            for parameter in module.parameters(recurse=False):
                kept[id(parameter)] = nn.Parameter(parameter.detach().bfloat16(), requires_grad=False)
    return copy.deepcopy(network, kept)

"""The parts of SANE that need a zoo: what trains it, what samples from it, and what estimates both.

Training ends with the anchors that new codes are drawn around. B examples, K training checkpoints, L tokens of a
checkpoint, D token width, Z code width of a token, G networks of a tile.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from rpg.config import Config
from rpg.evaluation.judges import TaskScorer, less_is_better
from rpg.generation.request import Request
from rpg.generation.sampler import Tile, WatchTile
from rpg.generation.whole_networks import GROUP, LatentSampler, unflatten_values
from rpg.labs.sane.model import SaneConfig, TokenAutoencoder
from rpg.planning.estimator import GenerationFlops, LiveBytes, StepPart, count_flops
from rpg.planning.estimators import WholeNetworksEstimator
from rpg.planning.machine import FLOAT_BYTES, GenerationMemory, num_bytes
from rpg.planning.zoo_summary import ZooSummary
from rpg.seeding import make_rng
from rpg.tasks import task_of
from rpg.tasks.base import AdapterScorer, Classifier, LogitTask, MetricsTask, SampleTask
from rpg.training.whole_networks import WholeNetworkTrainer
from tokenization.errors import InputError


class SaneTrainer(WholeNetworkTrainer):
    """The state of a run of SANE; a step takes whole checkpoints, twice with different noise."""

    network: TokenAutoencoder
    title = "SANE"

    @property
    def settings(self) -> SaneConfig:
        """The section ``model`` of the configuration."""
        return cast(SaneConfig, self.config.model)

    def loss(self, step: int, examples: list[int]) -> Tensor:
        """The loss of a step's checkpoints."""
        tokens = unflatten_values(self.layout, self.sampler.vectors[examples])  # [B, L, D]
        noise = torch.randn(2, *tokens.shape, generator=make_rng(self.config.seed, "sane", step))
        inputs = (each.to(self.accelerator.device) for each in (tokens, self.layout.mask.float(), noise))
        with self.accelerator.autocast():
            return self.model(*inputs)

    @torch.no_grad()
    def complete(self, network: TokenAutoencoder) -> None:
        """Choose the anchors: codes of the training checkpoints, of the best of them, or bootstrapped from those.

        A code's score is that of the network it decodes to. Raises InputError if no task scores single networks.
        """
        network.eval()
        parts = self.sampler.vectors.split(self.config.train.batch_size)
        codes = torch.cat([network.encode(unflatten_values(self.layout, part)) for part in parts])  # [K, L, Z]
        bootstrap = self.settings.bootstrap
        if self.settings.best < 1 or bootstrap is not None:
            split = bootstrap.split if bootstrap is not None else "train"
            codes, scores = self._best(codes, self._scores(network, codes, split), self.settings.best * len(codes))
        network.fill(anchors=codes)
        for number in range(bootstrap.rounds if bootstrap is not None else 0):
            assert bootstrap is not None
            rngs = [make_rng(self.config.seed, "bootstrap", number, i) for i in range(bootstrap.candidates)]
            drawn = network.draw(*random_numbers(network, rngs))
            scores = torch.cat([scores, self._scores(network, drawn, bootstrap.split)])
            codes, scores = self._best(torch.cat([codes, drawn]), scores, bootstrap.keep)
            network.fill(anchors=codes)

    def _best(self, codes: Tensor, scores: Tensor, num: float) -> tuple[Tensor, Tensor]:
        chosen = scores.argsort(descending=True, stable=True)[: max(1, round(num))]
        return codes[chosen], scores[chosen]

    def _scores(self, network: TokenAutoencoder, codes: Tensor, split: str) -> Tensor:
        """The score of the network that each of the codes ``[n, L, Z]`` decodes to, ``[n]``; more is better.

        It is the first metric, but of classifiers their cross-entropy, where the task tells logits.
        """
        task = task_of(self.zoo, self.config.task)
        networks = [self.layout.decode(network.decode(each[None])[0] * self.layout.mask) for each in codes]
        if isinstance(task, LogitTask) and isinstance(task, Classifier):
            labels = task.labels(split)
            return torch.stack([-F.cross_entropy(logits.float(), labels) for logits in task.logits(networks, split)])
        if not isinstance(task, MetricsTask | SampleTask | Classifier | AdapterScorer):
            raise InputError("model.best and model.bootstrap need a task that scores single networks; leave them out")
        scorer = TaskScorer(task, split)
        found = [next(iter(scorer(each, None, "a network").items())) for each in networks]
        return torch.tensor([-value if less_is_better([name]) else value for name, value in found])


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

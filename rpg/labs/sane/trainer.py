"""Training of SANE: the autoencoder of token sequences, then the anchors that new codes are drawn around.

B examples, K training checkpoints, L tokens of a checkpoint, D token width, Z code width of a token.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from rpg.labs.sane.model import SaneConfig, TokenAutoencoder
from rpg.labs.sane.sampler import random_numbers
from rpg.models.pdiff import unflatten_values
from rpg.seeding import make_rng
from rpg.tasks import task_of
from rpg.tasks.base import Classifier, LogitTask, MetricsTask
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

        Classifiers are scored by their cross-entropy, where the task tells logits.
        """
        task: Any = task_of(self.zoo, self.config.task)
        networks = [self.layout.decode(network.decode(each[None])[0] * self.layout.mask) for each in codes]
        if isinstance(task, LogitTask) and isinstance(task, Classifier):
            labels = task.labels(split)
            return torch.stack([-F.cross_entropy(logits.float(), labels) for logits in task.logits(networks, split)])
        if isinstance(task, Classifier):
            return (task.predict(networks, split) == task.labels(split)).float().mean(1)
        if isinstance(task, MetricsTask):
            metrics = [next(iter(task.own_metrics(each, split).items())) for each in networks]
            return torch.tensor([-value if "loss" in name or "error" in name else value for name, value in metrics])
        raise InputError("model.best and model.bootstrap need a task that scores single networks; leave them out")

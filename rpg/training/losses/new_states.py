"""The loss of networks of new permutation states, which no checkpoint has: they must work, and differ from each other.

A generator that only imitates its zoo is as good as a Gaussian with the zoo's variances: both know which weights vary,
neither knows which changes hurt. Here states are drawn from a Gaussian around the learned ones, wider than they spread;
the network that one sampling step makes of each is run on training images, and its cross-entropy reaches the generator.
A second term keeps the networks of a step apart: without it, or if it only kept them away from the zoo, one new place
would do for them all.

E networks, L tokens, D token width, K states, S state width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rpg.models.denoiser.unet1d import UNet1d
from rpg.models.recurrent_diffusion import RecurrentDiffusion
from rpg.tasks.base import ImageClassifier, Task
from rpg.tasks.side_by_side import SideBySide
from rpg.training.config import NewStatesConfig
from tokenization.errors import InputError
from tokenization.layouts import Layout


class NewStatesLoss:
    """Scores networks of new states.

    Args:
        network: the generator's networks.
        task: its target network, training images and labels.
        layout: decodes tokens; residual normalisation, so that 1 is the zoo's own root mean square deviation.
        config: weights and sizes.

    Raises:
        InputError: there is no table of states to draw around, or the task has no images.
    """

    def __init__(self, network: RecurrentDiffusion, task: Task, layout: Layout, config: NewStatesConfig) -> None:
        if network.num_states < 2:
            raise InputError("train.new_states needs two or more permutation states; set model.state.of.")
        if network.condition is not None:
            raise InputError("train.new_states takes no condition; set model.condition.kind: none.")
        if isinstance(network.denoiser, UNet1d):
            raise InputError(
                "train.new_states does not go with model.denoiser unet1d, whose batch normalisation would count "
                "networks that are not in the zoo; use mlp."
            )
        if not isinstance(task, ImageClassifier):
            raise InputError(f"train.new_states needs a task with images; {type(task).__name__} has none.")
        if layout.options.normalization != "residual":
            raise InputError(
                f"train.new_states needs tokens.normalization: residual; it is {layout.options.normalization}."
            )
        self.network, self.layout, self.config = network, layout, config
        self.images, self.labels = task.images("train"), task.labels("train")
        self.networks = SideBySide(task.build())
        self.mask = layout.mask.float()

    def __call__(self, rng: torch.Generator) -> Tensor:
        """The weighted loss of one step; ``rng`` (on the CPU) draws states, noise and images."""
        count = self.config.networks
        temperature = 1 + (self.config.temperature - 1) * torch.rand(count, generator=rng)  # [E]
        noise = torch.randn(count, *self.mask.shape, generator=rng)  # [E, L, D]
        states = self.states(temperature, rng)
        tokens = self.network.one_step(noise.to(states.device), self.mask.to(states.device), states)  # [E, L, D]
        weights = self.layout.decode_batch(tokens, constants=True)
        rows = torch.randint(len(self.labels), (self.config.images,), generator=rng)
        logits = self.networks(weights, self.images[rows].to(tokens.device))  # [E, images, classes]
        labels = self.labels[rows].to(tokens.device).repeat(count)
        behaviour = F.cross_entropy(logits.flatten(0, 1).float(), labels)
        apart = (tokens - tokens.mean(0)).square().sum((1, 2)) * count / (count - 1)  # [E], unbiased
        size = (apart / self.mask.sum()).clamp(min=1e-12).sqrt()  # [E], root mean square, 1 in the zoo
        spread = F.relu(temperature.to(size.device) - size).square().mean()
        return self.config.weight * behaviour + self.config.spread * spread

    def states(self, temperature: Tensor, rng: torch.Generator) -> Tensor:
        """New states ``[E, S]``: the learned ones' Gaussian, each widened by its temperature ``[E]``."""
        assert self.network.state is not None
        table = self.network.state.weight.detach()  # [K, S]
        weights = torch.randn(len(temperature), len(table), generator=rng).to(table.device)
        deviation = weights @ (table - table.mean(0)) / len(table) ** 0.5
        return table.mean(0) + temperature.to(table.device)[:, None] * deviation

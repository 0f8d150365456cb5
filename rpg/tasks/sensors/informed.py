"""The other way to serve all sensors: one network that takes the sensor's settings as further inputs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rpg.seeding import derive_seed, make_rng
from rpg.tasks.sensors.sensors import SensorsTask


class InformedNetwork(nn.Module):
    """An MLP of image and settings.

    Args:
        task: gives images and settings.
        widths: of the hidden layers.
    """

    def __init__(self, task: SensorsTask, widths: Sequence[int]) -> None:
        super().__init__()
        inputs = task.images("train")[0].numel() + task.condition.num_inputs
        sizes = [inputs, *widths]
        layers = [each for first, last in itertools.pairwise(sizes) for each in (nn.Linear(first, last), nn.ReLU())]
        self.network = nn.Sequential(*layers, nn.Linear(sizes[-1], len(task.class_names)))

    def forward(self, images: Tensor, inputs: Tensor) -> Tensor:
        """What sensors see ``[T, B, C, S, S]`` and their settings' features ``[T, F]`` → logits ``[T, B, K]``."""
        told = inputs[:, None].expand(-1, images.shape[1], -1)
        return self.network(torch.cat([images.flatten(2), told], -1))

    @property
    def num_values(self) -> int:
        """Values of the network."""
        return sum(each.numel() for each in self.parameters())


def train_informed(task: SensorsTask, widths: Sequence[int], steps: int) -> InformedNetwork:
    """Train it as the generalist is trained, on fresh sensors in every step."""
    config, rng = task.config.generalist, make_rng(task.config.seed, "informed", *widths)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(task.config.seed, "informed", *widths))
        network = InformedNetwork(task, widths)
    optimizer = torch.optim.Adam(network.parameters(), config.learning_rate / 4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate / 4, total_steps=steps + 1)
    for _ in range(steps):
        images, classes = task.draw_for_each(config.sensors, config.images, rng)
        settings = task.draw_tasks(config.sensors, rng)
        logits = network(task.see(images, settings), task.condition.inputs(settings))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), classes.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)


def informed_probabilities(task: SensorsTask, network: InformedNetwork, settings: Tensor, split: str) -> Tensor:
    """Class probabilities ``[T, B, K]`` on a split's images at each of the sensors ``[T, C]``."""
    return network(task.see(task.images(split), settings), task.condition.inputs(settings)).softmax(-1)

"""The network that a task trains and scores, without values, and what it takes to run it on images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rpg.devices import parse_device, task_device
from rpg.planning.estimator import LiveBytes, fake_copy
from rpg.planning.machine import FLOAT_BYTES, num_bytes
from rpg.tasks.images.config import (
    Cifar10SubsetsConfig,
    DigitsConfig,
    DigitsSubsetsConfig,
    ImageNetConfig,
    TimmFinetuneConfig,
)
from rpg.tasks.images.networks import build_network

NUM_DIGITS = 500
"""Test images of the tasks on digits, which are scored together."""


@dataclass(frozen=True)
class Target:
    """A task's network.

    Attributes:
        network: on the meta device.
        shape: of an image.
        device: where the task computes.
        scored: images that are scored together.
    """

    network: nn.Module
    shape: tuple[int, int, int]
    device: torch.device
    scored: int

    @property
    def weights(self) -> int:
        """Bytes of parameters and buffers."""
        return num_bytes([*self.network.parameters(), *self.network.buffers()])

    def step_bytes(self, images: int) -> int | None:
        """Activations and gradients at their peak, of a training step; None where images do not fit the network."""
        return self._peak(images, training=True)

    @property
    def scoring_bytes(self) -> int | None:
        """The network, the images that are scored together and their activations at their peak; None as above."""
        peak = self._peak(self.scored, training=False)
        return None if peak is None else self.weights + self.image_bytes(self.scored) + peak

    def image_bytes(self, images: int) -> int:
        """Bytes of images."""
        return images * math.prod(self.shape) * FLOAT_BYTES

    def _peak(self, images: int, training: bool) -> int | None:
        try:
            with FakeTensorMode(), torch.set_grad_enabled(training):
                network = fake_copy(self.network).train(training)
                batch = torch.empty(images, *self.shape)
                with LiveBytes() as live:
                    logits: Tensor = network(batch)
                    if training:
                        logits.float().logsumexp(1).mean().backward()
                return live.peak
        except (RuntimeError, AssertionError):  # the task says so itself
            return None


def find_target(task: Any) -> Target | None:
    """The network of a task's configuration; None of a task that nothing is known of here.

    Raises InputError where the device that the task names is not there.
    """
    if isinstance(task, DigitsConfig | DigitsSubsetsConfig):
        classes, size = 10 if isinstance(task, DigitsConfig) else 2, task.image_size
        with torch.device("meta"):
            network = build_network(task.network, in_channels=1, image_size=size, num_classes=classes)
        return Target(network, (1, size, size), parse_device("cpu"), NUM_DIGITS)
    if not isinstance(task, Cifar10SubsetsConfig | ImageNetConfig | TimmFinetuneConfig):
        return None
    import timm

    if not timm.is_model(task.network):
        return None  # the task says so itself
    options: dict[str, Any] = {"num_classes": task.num_classes if isinstance(task, ImageNetConfig) else 1000}
    device = task_device(getattr(task, "device", "auto"))
    if isinstance(task, Cifar10SubsetsConfig):
        options = {"num_classes": 2} | ({"img_size": task.image_size} if "vit" in task.network else {})
        scored = task.eval_batch
    else:
        scored = task.batch_size
    with torch.device("meta"):
        network = timm.create_model(task.network, **options)
    return Target(network, (3, task.image_size, task.image_size), device, scored)

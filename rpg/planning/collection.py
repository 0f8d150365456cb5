"""What training the checkpoints of a zoo takes: one network, its gradients and moments, and a batch's activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rpg.config import Config
from rpg.devices import parse_device, task_device
from rpg.planning.guard import Need
from rpg.planning.memory import num_bytes
from rpg.planning.peak import LiveBytes, fake_copy, fake_mode
from rpg.planning.plan import CUDA_BYTES
from rpg.tasks.config import DigitsConfig, ImageNetConfig, TimmFinetuneConfig
from rpg.tasks.images.networks import build_network


def collection_need(config: Config) -> Need | None:
    """What collecting the zoo takes; None of a task that nothing is known of here.

    Raises:
        InputError: the device that the task names is not there.
    """
    task = config.task
    if isinstance(task, DigitsConfig):
        device, shape = parse_device("cpu"), (1, task.image_size, task.image_size)
        with torch.device("meta"):
            network = build_network(task.network, in_channels=1, image_size=task.image_size, num_classes=10)
    elif isinstance(task, ImageNetConfig | TimmFinetuneConfig):
        import timm

        if not timm.is_model(task.network):
            return None  # the task says so itself
        device, shape = task_device(task.device), (3, task.image_size, task.image_size)
        classes = task.num_classes if isinstance(task, ImageNetConfig) else 1000
        with torch.device("meta"):
            network = timm.create_model(task.network, num_classes=classes)
    else:
        return None
    try:
        needed = training_bytes(network, (task.batch_size, *shape))
    except (RuntimeError, AssertionError):  # images of a size that the network does not take: the task says so itself
        return None
    cure = "lower task.batch_size"
    if device.type == "cpu":
        return Need("collecting", needed, 0, cure)
    return Need("collecting", num_bytes(network.parameters()), needed + CUDA_BYTES, cure)


def training_bytes(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Bytes of training a network (on the meta device) on a batch of images of a shape, by AdamW in fp32."""
    with fake_mode():
        network = fake_copy(network).train()
        weights = num_bytes([*network.parameters(), *network.buffers()])
        images = torch.empty(shape)
        with LiveBytes() as live:
            logits: Tensor = network(images)
            logits.float().logsumexp(1).mean().backward()
        # activations and gradients, two moments, and the checkpoint on its way to the disk
        return live.peak + weights + 2 * num_bytes(network.parameters()) + weights + images.nbytes

"""What operations take, measured on tensors without values; and a task's network, and what running it on images takes.

Networks are built without storage, so that the largest configuration is measured in seconds on any machine. Kernels'
own scratch memory and the allocator's waste are not seen."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rpg.devices import parse_device, task_device
from rpg.planning.machine import FLOAT_BYTES, num_bytes
from rpg.tasks.images.config import (
    Cifar10SubsetsConfig,
    DigitsConfig,
    DigitsSubsetsConfig,
    ImageNetConfig,
    TimmFinetuneConfig,
)
from rpg.tasks.images.networks import build_network

LSTM_WORKSPACE = {torch.float32: 22, torch.bfloat16: 11}
"""Bytes an LSTM on a CPU writes for each value it returns, for its backward pass, which writes as many again. Measured,
since PyTorch's shape function for it says none. It asks the system for 61 and 43; the rest is never touched."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations allocate while it is active, and their peak.

    What existed before is not counted; a view costs nothing. What a kernel allocates and frees itself is not seen.
    ``live`` are the bytes alive now, ``peak`` the most there ever were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and count what it returns."""
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._count(tensor, 0)
        result = func(*args, **(kwargs or {}))
        workspace = result[3] if func is torch.ops.aten.mkldnn_rnn_layer.default and args[-1] else None  # in training
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                size = _lstm_workspace(result[0]) if tensor is workspace else tensor.untyped_storage().nbytes()
                self._count(tensor, size)
        backward = func is torch.ops.aten.mkldnn_rnn_layer_backward.default
        self.peak = max(self.peak, self.live + (_lstm_workspace(result[0]) if backward else 0))
        return result

    def _count(self, tensor: Tensor, num_bytes: int) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # which Python's object of a storage keeps as long as that lives
        if key in self._known:
            return

        def forget(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= num_bytes

        self._known[key] = weakref.ref(storage, forget)
        self.live += num_bytes


def _lstm_workspace(values: Tensor) -> int:
    return LSTM_WORKSPACE.get(values.dtype, 0) * values.numel()


def fake_copy(network: nn.Module) -> nn.Module:
    """Give a network on the meta device fake parameters and buffers on the CPU, in place, in a `FakeTensorMode`."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, nn.Parameter(_empty_like(parameter), parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, _empty_like(buffer))
    return network


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _lstm(input_shape: Any, *arguments: Any, out_shape: Any = None, **_: Any) -> int:
    """One layer and direction ``[L, B, in]``: four gates of in + H inputs each at every place."""
    length, batch, d_input = input_shape
    d_model = out_shape[0][-1]
    return 8 * length * batch * d_model * (d_input + d_model)


def _lstm_backward(input_shape: Any, weight: Any, hidden_weight: Any, *arguments: Any, **_: Any) -> int:
    """Twice the forward pass: the gradients of inputs and of weights."""
    length, batch, d_input = input_shape
    d_model = hidden_weight[-1]
    return 16 * length * batch * d_model * (d_input + d_model)


RECURRENCES = {torch.ops.aten.mkldnn_rnn_layer: _lstm, torch.ops.aten.mkldnn_rnn_layer_backward: _lstm_backward}
"""What PyTorch's own counter does not know."""


def count_flops() -> Any:
    """A context in which operations are counted, those of recurrences too; ask it ``get_total_flops()``."""
    from torch.utils.flop_counter import FlopCounterMode  # which loads triton

    return FlopCounterMode(display=False, custom_mapping=RECURRENCES)


@dataclass(frozen=True)
class GenerationFlops:
    """FLOPs of one generated network.

    Attributes:
        backbone: all prototypes.
        once: what is computed once per token.
        step: one call of the denoiser for one token, with its share of what a tile computes once a step.
        known: what of the tokens is known in closed form, of the whole network.
        total: all of them, with every step of every token.
        directions: the products of coefficients with the zoo's directions, of the whole network.
    """

    backbone: int
    once: int
    step: int
    known: int
    total: int
    directions: int = 0


class StepPart(NamedTuple):
    """What a training step computes at a time: one forward pass, whose gradients are added to those of the others.

    Attributes:
        forward: computes a tuple, the loss first, that lives until the backward pass is done.
        num_bytes: of the rows that go in, and their noise.
    """

    forward: Callable[[], tuple[Tensor, ...]]
    num_bytes: int


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

"""What a kind of model will need before it is made: parameters, FLOPs, bytes read, peak memory.

The networks are built without storage and their operations run on tensors without values, so that the largest
configuration is measured in seconds on any machine. Kernels' own scratch memory and the allocator's waste
are not seen."""

from __future__ import annotations

import math
import re
import resource
import sys
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rpg.config import Config
from rpg.models import build_network
from rpg.planning.machine import GenerationMemory, TrainingMemory, checkpoint_bytes, moment_bytes, num_bytes
from rpg.planning.zoo_summary import ZooSummary
from tokenization.spectral.fit import fitting_bytes
from tokenization.spectral.layout import SpectralLayout

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


def peak_resident_bytes() -> int:
    """The highest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the parent held when it started this process
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


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


def count_flops() -> Any:
    """A context in which operations are counted, those of recurrences too; ask it ``get_total_flops()``."""
    from torch.utils.flop_counter import FlopCounterMode  # which loads triton

    return FlopCounterMode(display=False, custom_mapping=RECURRENCES)


class StepPart(NamedTuple):
    """What a training step computes at a time: one forward pass, whose gradients are added to those of the others.

    Attributes:
        forward: computes a tuple, the loss first, that lives until the backward pass is done.
        num_bytes: of the rows that go in, and their noise.
    """

    forward: Callable[[], tuple[Tensor, ...]]
    num_bytes: int


class Estimator(ABC):
    """The needs of one kind of model, each kind a class of its own.

    A kind that is not fitted by gradient steps overrides `training_flops` and `training_memory` instead of `step_part`.

    Attributes:
        checkpoints_per_step: checkpoints in one training step, over all processes.
        rows_per_step: token rows in one training step, over all processes.
        num_parts: parts of a training step, each with a forward and a backward pass.
        cache_bytes: of the encoded zoo that training keeps in memory; 0 where the rows are read from disk.
    """

    checkpoints_per_step: int
    rows_per_step: int
    num_parts: int = 1
    cache_bytes: int

    def __init__(self, config: Config, zoo: ZooSummary) -> None:
        self.config = config
        self.model: Any = config.model  # each kind knows what its own section holds
        self.zoo = zoo

    @abstractmethod
    def step_part(self, network: Any, num_processes: int) -> StepPart:
        """One process's part of a training step on a `fake_network`, in a `FakeTensorMode`."""

    def waiting_bytes(self, num_processes: int) -> int:
        """Bytes of the rows that a process reads ahead; none unless the kind does so."""
        return 0

    def scratch_bytes(self, network: Any) -> int:
        """Bytes that kernels take while they compute, which no tensor of a step holds."""
        return 0

    def averaged(self, network: Any) -> nn.Module:
        """The part of the networks whose moving average is kept."""
        return network

    @abstractmethod
    def sampling_memory(self, network: Any, weights: int) -> GenerationMemory:
        """Peak memory of generation by a `fake_network` of ``weights`` bytes, in a `FakeTensorMode`.

        Loading is counted here only where it takes other than the parameters once more.
        """

    @abstractmethod
    def sampling_flops(self, network: Any, steps: int) -> GenerationFlops:
        """FLOPs, less the directions', of a network that a `fake_network` makes in ``steps`` steps; likewise."""

    @property
    def fitting_bytes(self) -> int:
        """What finding the zoo's directions takes at its peak; 0 where tokens are values."""
        layout = self.zoo.layout
        return fitting_bytes(self.zoo.num_checkpoints, layout.basis.shape) if isinstance(layout, SpectralLayout) else 0

    @property
    def bytes_read_per_step(self) -> int:
        """Bytes of checkpoints that a training step's rows come from, on average; none are read twice if cached.

        Coefficients are in memory from the start.
        """
        layout = self.zoo.layout
        if isinstance(layout, SpectralLayout):
            return 0
        return round(checkpoint_bytes(layout) / layout.num_tokens * self.rows_per_step)

    def meta_network(self) -> Any:
        """The generator's networks without storage (on the meta device)."""
        with torch.device("meta"):
            return build_network(self.config.model, self.zoo.layout, self.zoo.num_states, self.zoo.condition_size)

    def fake_network(self, network: Any) -> Any:
        """Give a `meta_network`, which was made outside of it, shapes on the CPU in a `FakeTensorMode`, in place."""
        return fake_copy(network)

    def parameters(self) -> dict[str, int]:
        """Number of parameters by component; they add up to all."""
        counts: Counter[str] = Counter()
        for name, parameter in self.meta_network().named_parameters():
            component = name.split(".")[0].removesuffix("_embedding").removesuffix("_projection")
            counts["condition" if component == "denoiser_condition" else component] += parameter.numel()
        return dict(counts)

    def training_flops(self, num_processes: int = 1) -> int:
        """FLOPs of a training step of one process: forward, backward and what activation checkpointing repeats."""
        network = self.meta_network().train()
        with FakeTensorMode():
            part = self.step_part(self.fake_network(network), num_processes)
            with count_flops() as counter:
                part.forward()[0].backward()
        return self.num_parts * counter.get_total_flops()

    def training_memory(self, *, bf16: bool = False, num_processes: int = 1) -> TrainingMemory:
        """Peak memory of one of ``num_processes`` training processes, data parallel; ``bf16``: under autocast."""
        network = self.meta_network().train()
        with FakeTensorMode():
            network = self.fake_network(network)
            gradients = num_bytes(network.parameters())
            weights = gradients + num_bytes(network.buffers())
            part = self.step_part(network, num_processes)
            with LiveBytes() as live:
                for _ in range(min(2, self.num_parts)):  # a second part finds the first one's gradients
                    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                        outputs = part.forward()
                    outputs[0].backward()
                    del outputs
            moments = sum(moment_bytes(self.config.train.optimizer, each) for each in network.parameters())
            average = num_bytes(self.averaged(network).parameters())
        return TrainingMemory(
            weights=weights,
            gradients=gradients,
            optimizer=moments,
            ema=average,
            activations=max(0, live.peak - gradients) + self.scratch_bytes(network),
            batch=part.num_bytes,
            waiting=self.waiting_bytes(num_processes),
            cache=self.cache_bytes,
            fitting=self.fitting_bytes,
        )

    @torch.no_grad()
    def generation_flops(self, steps: int | None = None) -> GenerationFlops:
        """FLOPs of one generated network with ``steps`` sampling steps (the configuration's when None)."""
        network = self.meta_network().eval()
        with FakeTensorMode():
            found = self.sampling_flops(self.fake_network(network), steps or self.config.generate.steps)
        if not isinstance(layout := self.zoo.layout, SpectralLayout):
            return found
        products = 2 * math.prod(layout.basis.shape)  # of a network's coefficients with L·k·D numbers
        return replace(found, directions=products, total=found.total + products)

    @torch.no_grad()
    def generation_memory(self) -> GenerationMemory:
        """Peak memory of generating into files, however many networks."""
        network = self.meta_network().eval()
        bf16 = self.config.generate.precision == "bf16"
        with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            network = self.fake_network(network)
            parameters = num_bytes(network.parameters())
            weights = parameters + num_bytes(network.buffers())
            found = self.sampling_memory(network, weights)
            return replace(found, loading=found.loading or weights + parameters)

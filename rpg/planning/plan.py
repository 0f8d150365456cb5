"""What a configuration will need, before anything is collected or trained: parameters, FLOPs, memory by component."""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from rpg.config import Config
from rpg.planning.estimator import Estimator
from rpg.planning.estimators import KernelRidgeEstimator, PDiffEstimator, RecurrentEstimator, SaneEstimator
from rpg.planning.memory import GenerationMemory, TrainingMemory
from rpg.planning.peak import GenerationFlops
from rpg.planning.zoo_summary import DEFAULT_CHECKPOINTS, ZooSummary
from rpg.precision import mixed_precision
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError
from tokenization.layouts import Layout, layout_without_statistics

GIB = 1 << 30

GPUS = {
    "t4": 16, "l4": 24, "a10": 24, "rtx3090": 24, "rtx4090": 24, "rtx5090": 32, "a100-40gb": 40, "l40s": 48,
    "a6000": 48, "a100": 80, "h100": 80, "h200": 140, "b200": 180,
}  # fmt: skip
"""GiB of memory."""

CUDA_BYTES = GIB
"""What CUDA, its libraries and the allocator's gaps take of a GPU. A guess on the safe side: not measured."""

OPTIMIZER_BYTES = 150 << 20
"""What of Python's modules PyTorch loads when it makes its first optimizer (torch 2.15)."""

ESTIMATORS: dict[str, type[Estimator]] = {
    "recurrent": RecurrentEstimator,
    "pdiff": PDiffEstimator,
    "kernel_ridge": KernelRidgeEstimator,
    "sane": SaneEstimator,
}
"""What estimates the needs of each kind of model."""


@dataclass(frozen=True)
class Plan:
    """The needs of one process.

    Attributes:
        config: the experiment.
        zoo: what it learns from.
        checkpoints_per_step: checkpoints in one training step, over all processes.
        rows_per_step: token rows in one training step, over all processes.
        bytes_read_per_step: bytes of the checkpoints that they come from.
        bf16: whether training computes in bf16.
        parameters: of the generator, by component.
        training_flops: of one step.
        generation_flops: of one network.
        training: peak memory.
        generation: peak memory of generating into files.
        process: resident bytes of Python and its libraries, on top of either where the CPU computes.
    """

    config: Config
    zoo: ZooSummary
    checkpoints_per_step: int
    rows_per_step: int
    bytes_read_per_step: int
    bf16: bool
    parameters: dict[str, int]
    training_flops: int
    generation_flops: GenerationFlops
    training: TrainingMemory
    generation: GenerationMemory
    process: int

    @property
    def on_gpu(self) -> int:
        """Bytes of a GPU that training or generation takes, whichever is more."""
        return max(self.training.on_device, self.generation.total) + CUDA_BYTES


@dataclass(frozen=True)
class Largest:
    """The largest target network for which a GPU has room.

    Attributes:
        num_values: of the network; 0 where not even the smallest fits.
        num_tokens: its tokens.
        num_bytes: what it takes of the GPU.
    """

    num_values: int
    num_tokens: int
    num_bytes: int


def build_estimator(config: Config, zoo: ZooSummary) -> Estimator:
    """What estimates the needs of the configuration's kind of model."""
    return ESTIMATORS[config.model.kind](config, zoo)


def make_plan(config: Config, zoo: ZooSummary, *, num_processes: int = 1) -> Plan:
    """Estimate everything without computing it; see `rpg.planning.estimator` for how.

    Args:
        config: the experiment.
        zoo: what it learns from.
        num_processes: processes over which a step's batch is split, data parallel.
    """
    process = psutil.Process().memory_info().rss
    to_load = 0 if "torch._dynamo" in sys.modules else OPTIMIZER_BYTES  # planning loads it, too
    bf16 = mixed_precision(config.train.precision) == "bf16"
    estimator = build_estimator(config, zoo)
    return Plan(
        config=config,
        zoo=zoo,
        checkpoints_per_step=estimator.checkpoints_per_step,
        rows_per_step=estimator.rows_per_step,
        bytes_read_per_step=estimator.bytes_read_per_step,
        bf16=bf16,
        parameters=estimator.parameters(),
        training_flops=estimator.training_flops(num_processes),
        generation_flops=estimator.generation_flops(),
        training=dataclasses.replace(
            estimator.training_memory(bf16=bf16, num_processes=num_processes), libraries=to_load
        ),
        generation=estimator.generation_memory(),
        process=process,
    )


def largest_network(config: Config, zoo: ZooSummary, num_bytes: int) -> Largest:
    """The largest target network whose generator can be trained, and generated with, in ``num_bytes`` of a GPU.

    The generator keeps its size: it is the number of tokens, hence of positions and prototypes, that grows. A layout
    of one long layer stands for any of as many tokens.
    """

    def needed(num_tokens: int) -> int:
        estimator = build_estimator(config, dataclasses.replace(zoo, layout=_long_layout(config, num_tokens)))
        training = estimator.training_memory(bf16=mixed_precision(config.train.precision) == "bf16")
        return max(training.on_device, estimator.generation_memory().total) + CUDA_BYTES

    low, low_bytes = 1, needed(1)
    if low_bytes > num_bytes:
        return Largest(0, 0, low_bytes)
    high = max(2, 2 * zoo.layout.num_tokens)
    while (high_bytes := needed(high)) <= num_bytes and high < 1 << 26:
        low, low_bytes, high = high, high_bytes, 2 * high
    while high - low > max(1, low // 100):
        # Memory grows nearly linearly: guess on the line between, then halve what remains.
        guess = low + round((high - low) * (num_bytes - low_bytes) / (high_bytes - low_bytes))
        middle = min(max(guess, low + 1 + (high - low) // 50), high - 1 - (high - low) // 50)
        found = needed(middle)
        if found <= num_bytes:
            low, low_bytes = middle, found
        else:
            high, high_bytes = middle, found
    return Largest(low * config.tokens.size, low, low_bytes)


def _long_layout(config: Config, num_tokens: int) -> Layout:
    values = torch.empty(num_tokens * config.tokens.size, device="meta")
    options = dataclasses.replace(config.tokens, include=("*",), exclude=(), flatten="layer", base=None)
    return layout_without_statistics(
        Checkpoint.without_values({"weight": values}, Path("largest")), options, DEFAULT_CHECKPOINTS
    )


def parse_memory(text: str) -> int:
    """``24GB``, ``80GiB`` or the name of a GPU as bytes. Raises InputError for anything else."""
    plain = text.lower().replace(" ", "").removeprefix("nvidia")
    if plain in GPUS:
        return GPUS[plain] * GIB
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(gb|gib|g|mb|mib|m)?", plain)
    if match is None:
        raise InputError(f"--memory {text!r} is no size; write one such as 24GB, or a GPU of {', '.join(GPUS)}")
    unit = {"gb": 10**9, "g": GIB, "gib": GIB, "mb": 10**6, "m": 1 << 20, "mib": 1 << 20, None: GIB}[match[2]]
    return round(float(match[1]) * unit)

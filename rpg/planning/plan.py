"""What a configuration will need, before anything is collected or trained: parameters, FLOPs, memory by component."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from rpg.config import Config
from rpg.planning import memory as estimate
from rpg.planning.fake_networks import meta_network
from rpg.planning.flops import GenerationFlops, generation_flops, training_flops
from rpg.planning.memory import GenerationMemory, TrainingMemory
from rpg.planning.subject import Subject
from rpg.tasks import build_task
from rpg.tasks.base import TaskFamily
from rpg.training.distributed import mixed_precision
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError
from tokenization.layouts import Layout, plan_layout
from tokenization.zoo.zoo import Zoo

GIB = 1 << 30

GPUS = {
    "t4": 16, "l4": 24, "a10": 24, "rtx3090": 24, "rtx4090": 24, "rtx5090": 32, "a100-40gb": 40, "l40s": 48,
    "a6000": 48, "a100": 80, "h100": 80, "h200": 140, "b200": 180,
}  # fmt: skip
"""GiB of memory."""

CUDA_BYTES = GIB
"""What CUDA, its libraries and the allocator's gaps take of a GPU. A guess on the safe side: not measured."""

DEFAULT_CHECKPOINTS = 50
"""Checkpoints of a zoo that is not there yet: the paper's number (arXiv 2501.11587)."""


@dataclass(frozen=True)
class Plan:
    """The needs of one process.

    Attributes:
        config: the experiment.
        subject: what it learns from.
        bf16: whether training computes in bf16.
        parameters: of the generator, by component.
        training_flops: of one step.
        generation_flops: of one network.
        training: peak memory.
        generation: peak memory of generating into files.
        process: resident bytes of Python and its libraries, on top of either where the CPU computes.
    """

    config: Config
    subject: Subject
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


def make_plan(config: Config, subject: Subject, *, num_processes: int = 1) -> Plan:
    """Estimate everything without computing it; see `rpg.planning.memory` for how.

    Args:
        config: the experiment.
        subject: what it learns from.
        num_processes: processes over which a step's batch is split, data parallel.
    """
    process = psutil.Process().memory_info().rss
    bf16 = mixed_precision(config.train.precision) == "bf16"
    return Plan(
        config=config,
        subject=subject,
        bf16=bf16,
        parameters=estimate.parameters(meta_network(config, subject)),
        training_flops=training_flops(config, subject, num_processes=num_processes),
        generation_flops=generation_flops(config, subject),
        training=estimate.training_memory(config, subject, bf16=bf16, num_processes=num_processes),
        generation=estimate.generation_memory(config, subject),
        process=process,
    )


def find_subject(
    config: Config, *, network: str | None = None, num_checkpoints: int | None = None, condition_size: int | None = None
) -> Subject:
    """What ``config`` learns from: its zoo, else the network of its task, else a timm network.

    Args:
        config: the experiment.
        network: name of a timm network, which goes before all else.
        num_checkpoints: of a zoo that is not there yet; `DEFAULT_CHECKPOINTS` when None.
        condition_size: values of a condition, or classes, where neither zoo nor task tells.

    Raises:
        InputError: nothing tells the structure of the target network, or the size of its condition.
    """
    if network is None and (Path(config.zoo) / "zoo.json").exists():
        return Subject.of(Zoo.open(config.zoo), config)
    checkpoint, known_size = _structure(config, network)
    count = num_checkpoints or DEFAULT_CHECKPOINTS
    size = 0
    if config.model.condition.kind != "none":
        size = condition_size or known_size or 0
        if not size:
            found = f"{config.model.condition.kind}, and no zoo"
            raise InputError("model.condition.kind", found, "the size of the condition", "give --condition-size")
    states = count if config.model.state.of == "checkpoint" else 1
    return Subject(plan_layout(checkpoint, config.tokens, count), count, states, size)


def _structure(config: Config, network: str | None) -> tuple[Checkpoint, int | None]:
    """The target network without values, and the size of its task's condition, if that is known."""
    if network is None and config.task is None:
        raise InputError(config.zoo, "no zoo", "one, or a task that says what network it is", "give --network NAME")
    if network is not None:
        import timm

        if not timm.is_model(network):
            raise InputError("--network", repr(network), "a timm model", "see timm.list_models()")
        with torch.device("meta"):
            return Checkpoint.without_values(timm.create_model(network).state_dict(), Path(network)), None
    assert config.task is not None
    task = build_task(config.task)
    with torch.device("meta"):
        checkpoint = Checkpoint.without_values(task.build().state_dict(), Path(config.zoo))
    with contextlib.suppress(InputError):
        return checkpoint, task.condition.size if isinstance(task, TaskFamily) else None
    return checkpoint, None


def largest_network(config: Config, subject: Subject, num_bytes: int) -> Largest:
    """The largest target network whose generator can be trained, and generated with, in ``num_bytes`` of a GPU.

    The generator keeps its size: it is the number of tokens, hence of positions and prototypes, that grows. A layout
    of one long layer stands for any of as many tokens.
    """

    def needed(num_tokens: int) -> int:
        other = dataclasses.replace(subject, layout=_long_layout(config, num_tokens))
        bf16 = mixed_precision(config.train.precision) == "bf16"
        training = estimate.training_memory(config, other, bf16=bf16)
        return max(training.on_device, estimate.generation_memory(config, other).total) + CUDA_BYTES

    low, low_bytes = 1, needed(1)
    if low_bytes > num_bytes:
        return Largest(0, 0, low_bytes)
    high = max(2, 2 * subject.layout.num_tokens)
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
    return plan_layout(Checkpoint.without_values({"weight": values}, Path("largest")), options, 50)


def parse_memory(text: str) -> int:
    """``24GB``, ``80GiB`` or the name of a GPU as bytes. Raises InputError for anything else."""
    plain = text.lower().replace(" ", "").removeprefix("nvidia")
    if plain in GPUS:
        return GPUS[plain] * GIB
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(gb|gib|g|mb|mib|m)?", plain)
    if match is None:
        raise InputError("--memory", repr(text), "a size such as 24GB, or a GPU", f"known: {', '.join(GPUS)}")
    unit = {"gb": 10**9, "g": GIB, "gib": GIB, "mb": 10**6, "m": 1 << 20, "mib": 1 << 20, None: GIB}[match[2]]
    return round(float(match[1]) * unit)

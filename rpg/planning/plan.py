"""What a configuration needs: parameters, FLOPs and peak memory by component, checked against what is free."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from rpg.config import Config
from rpg.console import console
from rpg.devices import chosen_device, mixed_precision
from rpg.generation.folders import find_folder, load_config
from rpg.models import part_of
from rpg.planning.estimators import Estimator
from rpg.planning.machine import FLOAT_BYTES, GenerationMemory, TrainingMemory, free_memory
from rpg.planning.measuring import GenerationFlops, find_target
from rpg.planning.zoo_summary import DEFAULT_CHECKPOINTS, ZooSummary
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError
from tokenization.layouts import Layout, layout_without_statistics, load_layout
from tokenization.zoo.zoo import Zoo

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


@dataclass(frozen=True)
class Plan:
    """The needs of one process.

    Attributes:
        estimator: knows the configuration, the zoo, and what a training step takes of it.
        bf16: whether training computes in bf16.
        parameters: of the generator, by component.
        training_flops: of one step.
        process: resident bytes of Python and its libraries, on top of either where the CPU computes.
    """

    estimator: Estimator
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
    return part_of(config.model, "estimator")(config, zoo)  # type: ignore[no-any-return]


def make_plan(config: Config, zoo: ZooSummary, *, num_processes: int = 1) -> Plan:
    """Estimate everything without computing it (`rpg.planning.estimators`), a batch split over ``num_processes``."""
    process = psutil.Process().memory_info().rss
    to_load = 0 if "torch._dynamo" in sys.modules else OPTIMIZER_BYTES  # planning loads it, too
    bf16, estimator = _in_bf16(config), build_estimator(config, zoo)
    parameters, training_flops = estimator.parameters(), estimator.training_flops(num_processes)
    generation_flops = estimator.generation_flops()
    training = estimator.training_memory(bf16=bf16, num_processes=num_processes)
    training = dataclasses.replace(training, libraries=to_load)
    generation = estimator.generation_memory()
    return Plan(estimator, bf16, parameters, training_flops, generation_flops, training, generation, process)


def _in_bf16(config: Config) -> bool:
    return mixed_precision(config.train.precision) == "bf16"


def largest_network(config: Config, zoo: ZooSummary, num_bytes: int) -> Largest:
    """The largest target network whose generator can be trained, and generated with, in ``num_bytes`` of a GPU.

    The generator keeps its size: it is the number of tokens, hence of positions and prototypes, that grows. A layout
    of one long layer stands for any of as many tokens.
    """

    def needed(num_tokens: int) -> int:
        estimator = build_estimator(config, dataclasses.replace(zoo, layout=_long_layout(config, num_tokens)))
        training = estimator.training_memory(bf16=_in_bf16(config))
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
    checkpoint = Checkpoint.without_values({"weight": values}, Path("largest"))
    return layout_without_statistics(checkpoint, options, DEFAULT_CHECKPOINTS)


def parse_memory(text: str) -> int:
    """``24GB``, ``80GiB`` or the name of a GPU as bytes. Raises InputError for anything else."""
    plain = text.lower().replace(" ", "").removeprefix("nvidia")
    if plain in GPUS:
        return GPUS[plain] * GIB
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(gb|gib|g|mb|mib|m)?", plain)
    if match is None:
        raise InputError(f"--memory {text!r} is not a size; write one such as 24GB, or a GPU of {', '.join(GPUS)}")
    unit = {"gb": 10**9, "g": GIB, "gib": GIB, "mb": 10**6, "m": 1 << 20, "mib": 1 << 20, None: GIB}[match[2]]
    return round(float(match[1]) * unit)


FLAG = "--ignore-memory"

HELD_VALUES = 1 << 26
"""Values of a small zoo, which an evaluation holds (`rpg.evaluation.span`)."""

CLEARLY_SMALL = 0.25
"""A rough bound below this share of the free memory needs no plan, which would take longer than loading."""


@dataclass(frozen=True)
class Need:
    """What a command needs at its peak.

    Attributes:
        what: of which it is said: "training".
        host: bytes of the machine's memory, of one process.
        device: bytes of a GPU, of one process; 0 on a CPU.
        cure: what to change.
    """

    what: str
    host: int
    device: int
    cure: str


def require_memory(need: Need) -> None:
    """Raise InputError where more is needed than is free."""
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    compared = [(need.host * processes, free_memory(), "of memory")]
    if need.device and (free := free_on_device()) is not None:
        compared.append((need.device, free, f"of {chosen_device() or 'the GPU'}"))
    for needed, free, where in compared:
        if needed > free:
            each = f" ({processes} processes)" if processes > 1 and where == "of memory" else ""
            raise InputError(
                f"{need.what} needs {_gib(needed)}{each}, {_gib(free)} {where} are free; {need.cure}, or try it "
                f"nevertheless with {FLAG}"
            )


def guard(find: Callable[[], Need | None], ignore: bool) -> None:
    """Stop, before anything begins, where more memory is needed than is free.

    Args:
        find: what is needed.
        ignore: whether the user said to begin all the same; then nothing is found out.
    """
    if ignore:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever is to be warned of, the command warns of
            need = find()
    except InputError:  # the command itself says it, or does without what is missing
        return
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        console.print(f"the memory needed could not be estimated ({reason}); starting without the check", markup=False)
        return
    if need is not None:
        require_memory(need)


def training_need(config: Config) -> Need | None:
    """What training a generator takes; None where it is clearly small, not known yet, or spread over processes.

    Raises InputError where the zoo does not allow it, as training would say itself.
    """
    from accelerate.utils import parse_flag_from_env

    spread = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if spread or not (Path(config.zoo) / "zoo.json").exists():
        return None
    estimator = build_estimator(config, ZooSummary.of(Zoo.open(config.zoo), config))
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if not _on_gpu() and rough_training_bytes(estimator) < CLEARLY_SMALL * free_memory():
        return None
    memory = estimator.training_memory(bf16=_in_bf16(config), num_processes=num_processes)
    cure = "lower train.batch_size or train.tokens, or see docs/scale.md for what else saves memory"
    if _on_gpu():
        host = max(memory.fitting, memory.waiting + memory.cache)
        return Need("training", host, memory.on_device + CUDA_BYTES, cure)
    return Need("training", memory.total, 0, cure)


def saved_parts(run: Path | str) -> tuple[Config, Layout, Checkpoint] | None:
    """Configuration, layout and weights of a generator; None where the folder is not whole."""
    folder = find_folder(run)
    if not all((folder / name).is_file() for name in ("config.yaml", "layout.json", "model.safetensors")):
        return None
    return load_config(folder), load_layout(folder), Checkpoint.open(folder / "model.safetensors")


def generation_need(run: Path | str) -> Need | None:
    """What generating into files takes; None where a rough bound is clearly small, or nothing is there to generate.

    Raises InputError if the generator folder is broken.
    """
    if (saved := saved_parts(run)) is None or (
        rough_generation_bytes(saved) < CLEARLY_SMALL * free_memory() and not _on_gpu()
    ):
        return None
    config, layout, checkpoint = saved
    weights = checkpoint.path.stat().st_size
    facts = json.loads(checkpoint.metadata.get("rpg", "{}"))
    condition = (facts.get("condition") or {}).get("size", 0) if config.model.condition.kind != "none" else 0
    summary = ZooSummary(layout, 1, facts.get("num_states", 1), condition)
    memory = build_estimator(config, summary).generation_memory()
    cure = "lower generate.tile_tokens in the generator's config.yaml, or take a smaller generator"
    if _on_gpu():
        return Need("generating", 2 * weights, memory.total + CUDA_BYTES, cure)
    return Need("generating", max(memory.total, 2 * weights), 0, cure)


def evaluation_need(run: Path | str) -> Need | None:
    """What evaluating a run takes; of a task that nothing is known of here the scored network's activations apart.

    None where there is no run. Raises InputError if the generator folder is broken.
    """
    if (saved := saved_parts(run)) is None or not (Path(saved[0].zoo) / "zoo.json").exists():
        return None
    config, layout, checkpoint = saved
    # one network at a time, as it is made, as it is loaded and what is computed of it; the zoo's mean, or a small zoo
    held = min(layout.num_values * len(Zoo.open(config.zoo)), HELD_VALUES)
    values = 5 * layout.num_values + held
    weights = checkpoint.path.stat().st_size
    host, cure = values * FLOAT_BYTES + 2 * weights, "free memory, or score on a larger machine"
    target = find_target(config.task)
    scoring = (target and target.scoring_bytes) or 0
    if target is None or target.device.type == "cpu":
        return Need("evaluating", host + scoring, 0, cure)
    return Need("evaluating", host, scoring + weights + CUDA_BYTES, "lower the task's images that are scored at a time")


def free_on_device() -> int | None:
    """Bytes that are free on the chosen GPU; None where that cannot be asked."""
    device = chosen_device()
    if device is None or device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info(device)[0]


def _on_gpu() -> bool:
    device = chosen_device()
    return device is not None and device.type != "cpu"


def rough_training_bytes(estimator: Estimator) -> int:
    """More than training of anything small takes, without following its steps."""
    parameters = list(estimator.meta_network().parameters())
    width = max((max(each.shape[-2:]) for each in parameters if each.ndim > 1), default=1)
    layout, batch = estimator.zoo.layout, estimator.checkpoints_per_step
    rows = 64 * (estimator.rows_per_step + batch * layout.num_tokens)
    values = 6 * sum(each.numel() for each in parameters) + rows * (layout.token_size + width)
    return values * FLOAT_BYTES + estimator.cache_bytes + estimator.fitting_bytes


def rough_generation_bytes(saved: tuple[Config, Layout, Checkpoint]) -> int:
    """More than generation of anything small takes, without building the networks of a generator's folder."""
    config, layout, checkpoint = saved
    width = max((max(info.shape[-2:]) for info in checkpoint.tensors.values() if len(info.shape) > 1), default=1)
    rows = 64 * (config.generate.tile_tokens + layout.num_tokens)
    return 3 * sum(checkpoint.sizes.values()) + rows * (layout.token_size + min(width, 1 << 14)) * FLOAT_BYTES


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.3g} GiB"

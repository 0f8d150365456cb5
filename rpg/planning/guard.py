"""The memory guard: what a command will need at its peak against what the machine has free, before it starts.

A system that runs out of memory kills the process without a word, often hours later. What is compared is the plan's
peak, which is exact for what it follows and knows nothing of other programs that may grow meanwhile.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from rpg.config import Config
from rpg.devices import chosen_device
from rpg.generation.folders import find_folder, load_config
from rpg.planning.estimator import Estimator
from rpg.planning.machine import free_memory
from rpg.planning.memory import FLOAT_BYTES
from rpg.planning.plan import CUDA_BYTES, GIB, build_estimator
from rpg.planning.target import find_target
from rpg.planning.zoo_summary import ZooSummary
from rpg.precision import mixed_precision
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError
from tokenization.layouts import load_layout
from tokenization.zoo.zoo import Zoo

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


def require_memory(need: Need, ignore: bool = False) -> None:
    """Stop where more is needed than is free.

    Raises:
        InputError: so it is, and ``ignore`` is not set.
    """
    if ignore:
        return
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


def training_need(config: Config) -> Need | None:
    """What training a generator takes; None where it is clearly small, not known yet, or spread over processes.

    Raises:
        InputError: the zoo does not allow it, as training would say itself.
    """
    from accelerate.utils import parse_flag_from_env

    spread = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if spread or not (Path(config.zoo) / "zoo.json").exists():
        return None
    estimator = build_estimator(config, ZooSummary.of(Zoo.open(config.zoo), config))
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if not _on_gpu() and rough_training_bytes(estimator) < CLEARLY_SMALL * free_memory():
        return None
    memory = estimator.training_memory(
        bf16=mixed_precision(config.train.precision) == "bf16", num_processes=num_processes
    )
    cure = "lower train.batch_size or train.tokens, or see docs/scale.md for what else saves memory"
    if _on_gpu():
        host = max(memory.fitting, memory.waiting + memory.cache)
        return Need("training", host, memory.on_device + CUDA_BYTES, cure)
    return Need("training", memory.total, 0, cure)


def generation_need(run: Path | str) -> Need | None:
    """What generating into files takes; None where a rough bound is clearly small, or nothing is there to generate.

    Raises:
        InputError: the generator folder is broken.
    """
    folder = find_folder(run)
    if not all((folder / name).is_file() for name in ("config.yaml", "layout.json", "model.safetensors")):
        return None
    config, layout = load_config(folder), load_layout(folder)
    weights = (folder / "model.safetensors").stat().st_size
    if rough_generation_bytes(folder) < CLEARLY_SMALL * free_memory() and not _on_gpu():
        return None
    facts = json.loads(Checkpoint.open(folder / "model.safetensors").metadata.get("rpg", "{}"))
    condition = (facts.get("condition") or {}).get("size", 0) if config.model.condition.kind != "none" else 0
    summary = ZooSummary(layout, 1, facts.get("num_states", 1), condition)
    memory = build_estimator(config, summary).generation_memory()
    cure = "lower generate.tile_tokens in the generator's config.yaml, or take a smaller generator"
    if _on_gpu():
        return Need("generating", 2 * weights, memory.total + CUDA_BYTES, cure)
    return Need("generating", max(memory.total, 2 * weights), 0, cure)


def evaluation_need(run: Path | str) -> Need | None:
    """What evaluating a run takes; of a task that nothing is known of here the scored network's activations apart.
    None where there is no run.

    Raises:
        InputError: the generator folder is broken.
    """
    folder = find_folder(run)
    if not (folder / "layout.json").is_file() or not (folder / "config.yaml").is_file():
        return None
    config, layout = load_config(folder), load_layout(folder)
    if not (Path(config.zoo) / "zoo.json").exists():
        return None
    # one network at a time, as it is made, as it is loaded and what is computed of it; the zoo's mean, or a small zoo
    held = min(layout.num_values * len(Zoo.open(config.zoo)), HELD_VALUES)
    values = 5 * layout.num_values + held
    weights = (folder / "model.safetensors").stat().st_size
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


def rough_generation_bytes(folder: Path) -> int:
    """More than generation of anything small takes, without building the networks of a generator folder."""
    config, layout = load_config(folder), load_layout(folder)
    checkpoint = Checkpoint.open(folder / "model.safetensors")
    width = max((max(info.shape[-2:]) for info in checkpoint.tensors.values() if len(info.shape) > 1), default=1)
    rows = 64 * (config.generate.tile_tokens + layout.num_tokens)
    return 3 * sum(checkpoint.sizes.values()) + rows * (layout.token_size + min(width, 1 << 14)) * FLOAT_BYTES


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.3g} GiB"

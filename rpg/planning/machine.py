"""What this machine has (`rpg doctor`), how much memory is free, and what tensors and checkpoints take of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from rpg.devices import FASTER, bf16_ratio
from rpg.models.backbone import has_bf16_lstm
from rpg.packages import install_command
from tokenization.layouts import Layout

CGROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that this process may still take: the machine's, within the limits of its control groups."""
    return max(0, min([psutil.virtual_memory().available, *_cgroup_room()]))


def _cgroup_room() -> list[int]:
    """Bytes left under each limit of this process's control groups, page cache that may be dropped not counted."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            root, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = root / place.strip("/")
        for folder in [own, *own.parents]:  # a limit of any group above holds, too
            if folder == root or root in folder.parents:
                found += _room_of(folder, *names)
    return found


def _room_of(folder: Path, limit: str, usage: str, droppable: str) -> list[int]:
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    if not most.isdigit() or int(most) >= 1 << 60:  # "max", or version 1's way of saying so
        return []
    return [int(most) - used + int(statistics.get(droppable, "0"))]


def devices() -> list[dict[str, Any]]:
    """Every device: ``name`` for --device, ``what`` it is, and of GPUs ``total`` and ``free`` bytes and ``bf16``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = {"name": "cpu", "what": f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads"}
    found: list[dict[str, Any]] = [cpu]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        what = torch.cuda.get_device_name(index)
        bf16 = torch.cuda.get_device_capability(index) >= (8, 0)
        found.append({"name": f"cuda:{index}", "what": what, "total": total, "free": free, "bf16": bf16})
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "what": "Apple GPU"})
    return found


def features() -> list[dict[str, Any]]:
    """What may be missing: its ``name``, whether it was ``found``, and what that costs or gives (``note``)."""
    gpu, ratio = torch.cuda.is_available(), bf16_ratio()
    mamba = gpu and _there("mamba_ssm", "causal_conv1d")
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    rows = [
        ("GPU", gpu, "trains and generates on it", "all is computed on the CPU: fine for configs/digits*.yaml, not for "
         "configs/large"),
        ("Mamba-2 kernels", mamba, "mamba2 backbones are fast on CUDA", "mamba2 backbones run in plain PyTorch: same "
         "numbers, slower and with more memory (on CUDA: "
         f"{install_command('mamba-ssm', 'causal-conv1d')})"),
        ("bf16 matrix products", ratio < FASTER, f"take {ratio:.2g} times as long as in fp32 on this CPU",
         f"take {ratio:.2g} times as long as in fp32 on this CPU: precision: auto takes fp32 there"),
        ("bf16 LSTM", has_bf16_lstm(), "LSTM backbones can compute in bf16 on this CPU",
         "LSTM backbones compute in fp32 on this CPU (it has no AVX-512)"),
        ("bitsandbytes", _there("bitsandbytes"), "train.optimizer: adamw8bit", "no train.optimizer: adamw8bit: moments "
         "take 8 bytes a parameter, not 2 "
         f"({install_command('bitsandbytes')})"),
        ("DeepSpeed", _there("deepspeed"), "configs/accelerate/deepspeed_*.yaml", "no deepspeed_*.yaml "
         f"({install_command('deepspeed')}); fsdp2.yaml shards without it"),
        ("C++ compiler", compiler is not None, "train.compile: inductor", "no train.compile: inductor"),
        ("meshes", _there("trimesh", "skimage"), "fields of shapes are read from and written as meshes",
         f"no meshes of solid shapes ({install_command('trimesh', 'scikit-image')})"),
    ]  # fmt: skip
    return [{"name": name, "found": found, "note": good if found else bad} for name, found, good, bad in rows]


def room() -> dict[str, Any]:
    """Bytes of memory (``free``: within the limits of control groups) and of the disks that are written to."""
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    places = {"here": Path.cwd(), "hub cache": hub, "temporary files": Path(tempfile.gettempdir())}
    disks = {}
    for name, path in places.items():
        there = next(each for each in (path, *path.parents) if each.exists())
        usage = shutil.disk_usage(there)
        disks[name] = {"path": str(path), "total": usage.total, "free": usage.free}
    return {"memory": {"total": psutil.virtual_memory().total, "free": free_memory()}, "disks": disks}


def hub() -> dict[str, Any]:
    """How the Hugging Face hub is reached; it is not asked: ``endpoint``, ``offline``, ``logged_in`` and a ``note``."""
    from huggingface_hub import constants, get_token

    offline, logged_in = bool(constants.HF_HUB_OFFLINE), get_token() is not None
    note = f"{constants.ENDPOINT}, {'logged in' if logged_in else 'not logged in (to push: hf auth login)'}"
    if offline:
        note = "HF_HUB_OFFLINE is set: nothing but its cache is read"
    return {"endpoint": constants.ENDPOINT, "offline": offline, "logged_in": logged_in, "note": note}


def _there(*modules: str) -> bool:
    return all(importlib.util.find_spec(each) is not None for each in modules)


FLOAT_BYTES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes by component; the components are the fields."""

    def components(self) -> dict[str, int]:
        """``{component: bytes}``."""
        return dataclasses.asdict(self)

    @property
    def total(self) -> int:
        """Peak in bytes."""
        return sum(self.components().values())


@dataclass(frozen=True)
class TrainingMemory(Memory):
    """Peak memory of a training process.

    Attributes:
        weights: parameters and buffers, fp32.
        gradients: of every parameter, fp32.
        optimizer: AdamW's two moments, of 4 bytes each or of 1.
        ema: the weights' moving average.
        activations: what the forward and the backward pass hold at their peak, gradients apart.
        batch: the token rows that are computed at a time, and their noise.
        waiting: rows that are read ahead, always in the host's memory.
        cache: the encoded zoo, where it is small enough to be kept; in the host's memory too.
        fitting: what the zoo's directions are found with, in the host's memory and before everything else.
        libraries: what the first optimizer makes PyTorch load, in the host's memory.
    """

    weights: int
    gradients: int = 0
    optimizer: int = 0
    ema: int = 0
    activations: int = 0
    batch: int = 0
    waiting: int = 0
    cache: int = 0
    fitting: int = 0
    libraries: int = 0

    @property
    def total(self) -> int:
        """Peak in bytes, of the steps or of what comes before them."""
        return max(self.fitting, self._steps)

    @property
    def on_device(self) -> int:
        """The part of the steps' peak that an accelerator has to hold."""
        return self._steps - self.waiting - self.cache - self.libraries

    @property
    def _steps(self) -> int:
        return sum(self.components().values()) - self.fitting


@dataclass(frozen=True)
class GenerationMemory(Memory):
    """Peak memory of generation into files. The residual means are read from the memory map and let go.

    Attributes:
        weights: parameters and buffers, fp32, and in bf16 once more what is multiplied in bf16.
        prototypes: of one network, or of the networks of one tile.
        backbone: what the backbone holds beyond them while it computes them.
        tile: the rows that are denoised together and what the denoiser makes of them.
        loading: the fp32 weights as they are and as they are read, before anything else.
    """

    weights: int
    prototypes: int = 0
    backbone: int = 0
    tile: int = 0
    loading: int = 0

    @property
    def total(self) -> int:
        """Peak in bytes: the backbone is done when the first tile begins, and loading before both."""
        return max(self.loading, self.weights + self.prototypes + max(self.backbone, self.tile))


def checkpoint_bytes(layout: Layout) -> int:
    """Bytes of the tokenised tensors of one checkpoint."""
    return sum(layer.num_values * layer.dtype.itemsize for layer in layout.layers)


def held_bytes(layout: Layout) -> int:
    """What each network adds when networks are generated into memory: its tokens and its state dict."""
    return layout.num_tokens * layout.token_size * FLOAT_BYTES + checkpoint_bytes(layout)


def moment_bytes(optimizer: str, parameter: Tensor) -> int:
    """AdamW's two moments of a parameter; in 8 bits (arXiv 2110.02861) a block of 256 shares a scale of 4 bytes."""
    if optimizer == "adamw8bit" and parameter.numel() >= 4096:
        return 2 * (parameter.numel() + FLOAT_BYTES * math.ceil(parameter.numel() / 256))
    return 2 * FLOAT_BYTES * parameter.numel()


def num_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of those that are tensors."""
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

"""What a machine can do for this program, and what it costs where it cannot: `rpg doctor`."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch

from rpg.models.backbone.lstm import has_bf16_lstm
from rpg.packages import install_command
from rpg.precision import FASTER, bf16_ratio

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

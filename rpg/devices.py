"""Devices: which are there, which one a command takes, alone or in several processes, threads and mixed precision.

Commands note it in the environment variable that accelerate reads, so that training, tasks and the processes they start
agree. A program that uses the package without a command has noted nothing: generators are then on the CPU.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch

from rpg.console import console
from tokenization.errors import InputError

VARIABLE = "ACCELERATE_TORCH_DEVICE"

PATIENCE = timedelta(days=7)
"""How long launched processes wait for the others, whose last part may take hours longer."""


def parse_device(name: torch.device | str) -> torch.device:
    """A device of this machine by its name: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, …; ``auto`` is the best there is.

    Raises:
        InputError: there is no such device here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    count = torch.accelerator.device_count() if accelerator is not None else 0
    known = ["cpu", *([accelerator.type] if accelerator is not None else [])]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"{name!r} is no name of a device; here are auto, {', '.join(known)}.") from None
    if device.type not in known or (device.index or 0) >= max(count, 1):
        raise InputError(f"There is no device {device} on this machine; here are auto, {', '.join(known)}.")
    return device


def use_device(name: str = "auto") -> torch.device:
    """Compute on a device from now on, in this process and those it starts.

    Raises:
        InputError: there is no such device.
    """
    device = parse_device(name)
    note_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what asks for no device in particular then takes this one
    return device


def device_of_run(name: str = "auto") -> torch.device:
    """The same for training, whose launched processes get their devices from accelerate.

    Raises:
        InputError: there is no such device, or it was named for launched processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return use_device(name)
    _require_own_devices(name)
    if name == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return parse_device("cpu" if os.environ.get("ACCELERATE_USE_CPU", "") == "true" else "auto")


def _require_own_devices(name: str) -> None:
    if name not in ("auto", "cpu"):
        raise InputError(f"--device {name} names one device for several processes; leave it out, or give cpu")


@dataclass(frozen=True)
class Partition:
    """The part of one of ``size`` processes that generate together; by default the whole.

    Tiles do not depend on one another, so whoever computes one computes the same bytes. With ``whole`` no network is
    shared tile by tile, as it must not be where networks are not written but looked at.
    """

    rank: int = 0
    size: int = 1
    whole: bool = False

    def takes(self, number: int) -> bool:
        """Whether this process is the one for the thing of this number."""
        return number % self.size == self.rank


def join_processes(device: str = "auto") -> tuple[Partition, torch.device]:
    """This process's part and device, as ``torchrun`` or ``accelerate launch`` started it; else all, on ``device``.

    All processes wait here for one another. Launched ones have devices of their own unless ``device`` is ``cpu``.

    Raises:
        InputError: there is no such device, or it was named for launched processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Partition(), use_device(device)
    _require_own_devices(device)
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Left to itself, accelerate takes several processes without a GPU for as many single ones.
    no_gpu = device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=no_gpu or parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
    atexit.register(torch.distributed.destroy_process_group)
    note_device(state.device)
    return Partition(state.process_index, state.num_processes), state.device


def note_device(device: torch.device) -> None:
    """Have everything in this process and those it starts take ``device``."""
    os.environ[VARIABLE] = str(device)
    accelerate = sys.modules.get("accelerate")  # which takes long to load
    if accelerate is not None and accelerate.PartialState._shared_state:  # it has read the variable already
        accelerate.PartialState().device = device


def chosen_device() -> torch.device | None:
    """The device that was chosen for this process; None before `use_device`."""
    name = os.environ.get(VARIABLE)
    return torch.device(name) if name else None


def task_device(name: str = "auto") -> torch.device:
    """Where a task computes: on the device it is configured for, else the chosen one, else the best there is.

    Raises:
        InputError: there is no such device.
    """
    return parse_device(name) if name != "auto" else chosen_device() or parse_device("auto")


@contextmanager
def use_threads(num: int) -> Iterator[None]:
    """Run torch on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run torch on one thread: faster for small networks, and the bits do not depend on the number of cores."""
    with use_threads(1):
        yield


MATRIX, REPEATS = 256, 3
"""Side of the matrices whose product is timed in both precisions, and how often; the fastest counts."""


@functools.cache
def bf16_ratio(device: str = "cpu") -> float:
    """Seconds of a matrix product in bf16 over those in fp32 on a type of device; measured once."""
    if device == "cuda":
        return 0.5 if torch.cuda.is_bf16_supported(including_emulation=False) else 2.0
    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        a, times = torch.ones(MATRIX, MATRIX, dtype=dtype, device=device), []
        for _ in range(REPEATS + 1):  # the first one prepares
            started = time.perf_counter()
            (a @ a)[0, 0].item()
            times.append(time.perf_counter() - started)
        seconds.append(min(times[1:]))
    return seconds[0] / seconds[1]


FASTER = 0.9
"""The ratio below which bf16 is worth its rounding."""


def in_bf16(precision: str, device: torch.device | None = None) -> bool:
    """Whether to compute in bf16: as is asked, and for ``auto`` where the device is faster so.

    What is asked and slower is said in one line.
    """
    device = device or chosen_device() or parse_device("auto")
    if precision == "fp32":
        return False
    ratio = bf16_ratio(device.type)
    if precision == "bf16" and ratio > 1.5:
        _say_slower(ratio)
    return precision == "bf16" or ratio < FASTER


@functools.cache
def _say_slower(ratio: float) -> None:
    console.print(
        f"bf16 was asked for, in which products take {ratio:.0f} times as long as in fp32 here; set precision to auto",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def mixed_precision(precision: str) -> str | None:
    """What accelerate is asked for, given ``train.precision``; None leaves it to the launcher's own setting."""
    if precision == "auto" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        return None
    return "bf16" if in_bf16(precision) else "no"

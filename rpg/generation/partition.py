"""Generation on several devices: which part of the networks each of the launched processes computes."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from rpg.devices import PATIENCE, note_device, use_device
from tokenization.errors import InputError


@dataclass(frozen=True)
class Partition:
    """The part of one of ``size`` processes that generate together; by default the whole.

    Tiles do not depend on one another, so whoever computes one computes the same bytes.

    Attributes:
        rank: which process this is.
        size: how many there are.
        whole: no network is shared tile by tile, as it must not be where networks are not written but looked at.
    """

    rank: int = 0
    size: int = 1
    whole: bool = False

    def takes(self, number: int) -> bool:
        """Whether this process is the one for the thing of this number."""
        return number % self.size == self.rank


def join_processes(device: str = "auto") -> tuple[Partition, torch.device]:
    """This process's part and device, as ``torchrun`` or ``accelerate launch`` started it; else all, on ``device``.

    All processes wait here for one another.

    Args:
        device: what the user asked for; launched processes have devices of their own unless it is ``cpu``.

    Raises:
        InputError: there is no such device, or it was named for launched processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Partition(), use_device(device)
    if device not in ("auto", "cpu"):
        raise InputError(f"--device {device} names one device for several processes; leave it out, or give cpu")
    # Left to itself, accelerate takes several processes without a GPU for as many single ones.
    no_gpu = device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=no_gpu or parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
    atexit.register(torch.distributed.destroy_process_group)
    note_device(state.device)
    return Partition(state.process_index, state.num_processes), state.device

"""Generation on several devices: which of the launched processes this one is."""

from __future__ import annotations

import atexit
import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from rpg.generation.sampler import Share


def join_processes() -> tuple[Share, torch.device]:
    """This process's share, and its device, as ``torchrun`` or ``accelerate launch`` started it; else all, on the CPU.

    All processes wait here for one another.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Share(), torch.device("cpu")
    # Left to itself, accelerate takes several processes without a GPU for as many single ones.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    atexit.register(torch.distributed.destroy_process_group)
    return Share(state.process_index, state.num_processes), state.device

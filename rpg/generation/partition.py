"""Generation on several devices: which part of the networks each of the launched processes computes."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


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


def join_processes() -> tuple[Partition, torch.device]:
    """This process's part and device, as ``torchrun`` or ``accelerate launch`` started it; else all, on the CPU.

    All processes wait here for one another.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Partition(), torch.device("cpu")
    # Left to itself, accelerate takes several processes without a GPU for as many single ones.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    atexit.register(torch.distributed.destroy_process_group)
    return Partition(state.process_index, state.num_processes), state.device

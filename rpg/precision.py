"""In which precision a device computes: as is asked, and for ``auto`` as it is quicker at."""

from __future__ import annotations

import functools
import os
import time

import torch

from rpg.console import console
from rpg.devices import chosen_device, parse_device

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

"""The device that a user names."""

from __future__ import annotations

import torch

from tokenization.errors import InputError


def parse_device(name: torch.device | str) -> torch.device:
    """A device of this machine by its name: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, …

    Raises:
        InputError: there is no such device here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if accelerator is not None else 0
    known = ["cpu", *([accelerator.type] if accelerator is not None else [])]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"{name!r} is no name of a device; here are {', '.join(known)}.") from None
    if device.type not in known or (device.index or 0) >= max(count, 1):
        raise InputError(f"There is no device {device} on this machine; here are {', '.join(known)}.")
    return device

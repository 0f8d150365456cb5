"""The process a run lives in: its precision, and the signals that ask it to stop."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import torch


def mixed_precision(precision: str) -> str | None:
    """What accelerate is asked for; None leaves it to the launcher's own setting."""
    if precision == "auto" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        return None
    if precision == "fp32" or (precision == "auto" and not fast_bf16()):
        return "no"
    return "bf16"


def fast_bf16() -> bool:
    """Whether bf16 matrix products are faster than fp32 ones on the device that will be used."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check is not None)


class StopSignal:
    """Turns the first SIGTERM or SIGINT into ``requested`` while the context is open; a second one acts as usual."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signum, self._before[signum])

    def __enter__(self) -> StopSignal:
        try:
            for name in (signal.SIGTERM, signal.SIGINT):
                self._before[name] = signal.signal(name, self._request)
        except ValueError:  # not the main thread: signals are someone else's business
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

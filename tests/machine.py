"""Which machine this is, as far as results depend on it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch


def machine() -> str:
    """What decides how sums are rounded."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    return hashlib.sha256(f"{torch.__version__} {flags}".encode()).hexdigest()

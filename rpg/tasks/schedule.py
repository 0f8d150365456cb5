"""The learning rate of a step, for target networks and for the generator."""

from __future__ import annotations

import math


def cosine_decay(step: int, steps: int) -> float:
    """From 1 at step 0 along a cosine to 0 at ``steps`` (arXiv 1608.03983, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def warm_cosine(step: int, steps: int, warmup_steps: int = 10) -> float:
    """A cosine to 0 times a linear warm-up, which runs beside it."""
    return min(1.0, (step + 1) / warmup_steps) * cosine_decay(step, steps)

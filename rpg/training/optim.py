"""Optimizers of a training run, and the learning rate of a step."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch

from rpg.packages import install_command
from rpg.tasks.schedule import cosine_decay
from rpg.training.config import TrainConfig
from tokenization.errors import InputError


def build_optimizer(settings: TrainConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that ``train.optimizer`` names.

    ``adamw8bit`` keeps both moments in 8 bits (arXiv 2110.02861): 2 bytes a parameter in place of 8.

    Raises:
        InputError: the library that it needs is not installed.
    """
    choices: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **choices)
    if importlib.util.find_spec("bitsandbytes") is None:
        cure = f"run {install_command('bitsandbytes')}"
        raise InputError(f"train.optimizer adamw8bit needs bitsandbytes, which is not installed; {cure}")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **choices)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to 0 at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    return config.learning_rate * cosine_decay(step - config.warmup_steps, max(1, config.steps - config.warmup_steps))

"""Optimizers of a training run, and the learning rate of a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rpg.config import TrainConfig
from rpg.packages import require_package
from rpg.tasks.collecting import cosine_decay


def build_optimizer(settings: TrainConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that ``train.optimizer`` names.

    ``adamw8bit`` keeps both moments in 8 bits (arXiv 2110.02861): 2 bytes a parameter in place of 8.

    Raises:
        InputError: the library that it needs is not installed.
    """
    rate, betas, decay = settings.learning_rate, settings.betas, settings.weight_decay
    choices: dict[str, Any] = {"lr": rate, "betas": betas, "weight_decay": decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **choices)
    require_package("bitsandbytes", "train.optimizer adamw8bit needs bitsandbytes")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **choices)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to 0 at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    return config.learning_rate * cosine_decay(step - config.warmup_steps, max(1, config.steps - config.warmup_steps))


class ExponentialMovingAverage:
    """fp32 shadows of named parameters, moved by ``1 - decay`` towards them at every update.

    The decay warms up as ``min(decay, (1 + n) / (10 + n))`` after n updates, so that short runs forget
    their random start.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.shadow = {name: parameter.detach().clone().float() for name, parameter in parameters}

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Move the shadows towards the parameters."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        live = dict(parameters)
        for name, shadow in self.shadow.items():  # not all at once: FSDP2's parameters are DTensors, buffers are not
            shadow.lerp_(live[name].detach().float(), 1 - decay)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back the shadows, and the number of updates as ``num_updates``."""
        self.num_updates = int(state["num_updates"])
        for name, shadow in self.shadow.items():
            shadow.copy_(state[name])

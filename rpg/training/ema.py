"""An exponential moving average of a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


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

"""Training that goes on where a kill ended it: network and optimizer in one file, at some step."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tokenization.checkpoint.checkpoint import Checkpoint, save_checkpoint

NETWORK, OPTIMIZER, STEP = "network/", "optimizer/", "rpg.step"


class SavedTraining:
    """What training needs in order to go on to the same bits, where batches and random numbers are addressed by step.

    Args:
        path: the file; it is there only while training is under way.
        network: parameters and buffers.
        optimizer: its state, whose values are all tensors.
    """

    def __init__(self, path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.path, self.network, self.optimizer = path, network, optimizer

    def save(self, step: int) -> None:
        """Write the state after ``step`` steps, in the place of an earlier one."""
        tensors = {NETWORK + name: value for name, value in self.network.state_dict().items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{OPTIMIZER}{number}/{name}": value for name, value in values.items()}
        save_checkpoint(self.path, tensors, {STEP: str(step)})

    def load(self) -> int:
        """Take up the saved state and return its step; 0 where there is none.

        Raises:
            InputError: the file is broken.
        """
        if not self.path.is_file():
            return 0
        saved, network = Checkpoint.open(self.path), self.network.state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        for key in saved.order:
            stored = saved.ties.get(key, key)
            if key.startswith(NETWORK):
                network[key.removeprefix(NETWORK)].copy_(saved.tensor(stored))  # in place: never two networks
            else:
                number, name = key.removeprefix(OPTIMIZER).split("/")
                state.setdefault(int(number), {})[name] = saved.tensor(stored)
            saved.release(stored)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        return int(saved.metadata[STEP])

    def remove(self) -> None:
        """Training is done."""
        self.path.unlink(missing_ok=True)

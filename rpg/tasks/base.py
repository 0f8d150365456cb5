"""What the rest of the package asks of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from tokenization.zoo.zoo import Zoo


class Task(Protocol):
    """Trains the checkpoints of a zoo and scores state dicts."""

    def build(self) -> nn.Module:
        """The target network, untrained."""

    def collect(
        self, path: Path | str, *, progress: Callable[[int, int], None] | None = None, limit: int | None = None
    ) -> Zoo:
        """Train checkpoints into the zoo at ``path``; complete it if it is partly there."""

    def predict(self, state_dicts: Iterable[Mapping[str, Tensor]], split: str = "test") -> Tensor:
        """Predicted classes of each network, int64 [num, images]."""

    def labels(self, split: str = "test") -> Tensor:
        """Right classes, int64 [images]."""

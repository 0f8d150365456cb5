"""A metric of the manifest as a condition: one number for each checkpoint, on a scale from -1 to 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenization.errors import InputError
from tokenization.zoo.zoo import ConditionSpec, Zoo


@dataclass(frozen=True)
class MetricScale:
    """How far a metric of the manifest reaches among the checkpoints to learn, mapped to -1 … 1."""

    name: str
    low: float
    high: float
    log: bool

    @classmethod
    def of_zoo(cls, zoo: Zoo, indices: Sequence[int], name: str, log: bool) -> MetricScale:
        """Measure the checkpoints ``indices``. Raises InputError as `metric_values` does, or if all are alike."""
        values = metric_values(zoo, indices, name)
        low, high = min(values), max(values)
        if low == high:
            raise InputError(f"{zoo.path} has the same {name} for all its checkpoints, which asks for nothing")
        if log and low <= 0:
            raise InputError(
                f"{zoo.path} has a {name} of {low:g}, which has no logarithm; set model.condition.scale to linear"
            )
        return cls(name, low, high, log)

    @property
    def condition(self) -> ConditionSpec:
        """What a generator's conditions mean: one number, the metric as it is measured."""
        return ConditionSpec("vector", 1, (self.name,))

    def scaled(self, values: Tensor) -> Tensor:
        """Values as they are measured, of any shape, on the scale; differentiable."""
        low, high = (math.log(end) if self.log else end for end in (self.low, self.high))
        if self.log:
            values = values.clamp(min=1e-12).log()
        return 2 * (values - low) / (high - low) - 1

    def asked(self, values: Tensor) -> Tensor:
        """`scaled`, of what a user asks for. Raises InputError if a value has no logarithm on a logarithmic scale."""
        if self.log and float(values.min()) <= 0:
            raise InputError(f"{self.name} {float(values.min()):g} has no logarithm; ask for more than 0")
        return self.scaled(values)

    def warning(self, values: Tensor) -> str | None:
        """What to warn of, if values that are asked for lie outside the zoo's."""
        slack = 1e-4 * (self.high - self.low)
        outside = [each for each in values.flatten().tolist() if not self.low - slack <= each <= self.high + slack]
        if not outside:
            return None
        return (
            f"{self.name} {outside[0]:g} lies outside what was learned, {self.low:.3g} to {self.high:.3g}: "
            "what comes is a guess"
        )


def metric_values(zoo: Zoo, indices: Sequence[int], name: str) -> list[float]:
    """The metric of checkpoints. Raises InputError if one of them lacks it."""
    for index in indices:
        metrics = zoo.entries[index].metrics
        if name not in metrics:
            known = ", ".join(metrics) or "none"
            raise InputError(
                f"{zoo.path / 'manifest.jsonl'}: {zoo.entries[index].file} has no metric {name!r} (it has {known}); "
                "set model.condition.name to one that all have"
            )
    return [zoo.entries[index].metrics[name] for index in indices]


def metric_conditions(zoo: Zoo, indices: Sequence[int], scale: MetricScale) -> Tensor:
    """The metric of checkpoints on its scale, ``[n, 1]`` float32. Raises InputError if one of them lacks it."""
    return scale.scaled(torch.tensor(metric_values(zoo, indices, scale.name)))[:, None]

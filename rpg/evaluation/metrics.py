"""Accuracy of each network, and summaries of any metric over many networks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor

from rpg.section import Section

NUM_RESAMPLES = 2000


class Summary(Section):
    """What is reported of one figure over several networks.

    ``ci95`` is the 95 % percentile bootstrap interval of the mean: it says how well the mean over *networks* is
    known, not over images. With one network it has no width.
    """

    mean: float
    max: float
    min: float
    std: float = Field(description="over the networks, with the n − 1 denominator; 0 for one network")
    ci95: tuple[float, float]


def accuracy(predictions: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers of each network: predictions [num, images], labels [images] → float64 [num], 0 … 1."""
    return (predictions == labels).double().mean(1)


def summarize(values: Tensor | Iterable[float], seed: int = 0) -> Summary:
    """Summarise one figure of each network."""
    values = torch.as_tensor(values if isinstance(values, Tensor) else list(values), dtype=torch.float64)
    assert values.ndim == 1 and len(values), "nothing to summarise"
    return Summary(
        mean=values.mean().item(),
        max=values.max().item(),
        min=values.min().item(),
        std=values.std().item() if len(values) > 1 else 0.0,
        ci95=bootstrap_interval(values, seed),
    )


def bootstrap_interval(values: Tensor, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of ``values``, float64 [num]; ``seed`` decides the resamples."""
    num = len(values)
    rows = torch.randint(num, (NUM_RESAMPLES, num), generator=torch.Generator().manual_seed(seed))
    low, high = torch.quantile(values[rows].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high

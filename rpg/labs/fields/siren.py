"""Sinusoidal fields (SIREN, arXiv 2006.09661), many side by side, and their fit by Gauss-Newton steps.

The start is antisymmetric: the second half of the hidden units repeats the first, with the opposite sign in the last
layer. Every field therefore starts as 0, however large the last layer is, and a large one makes fits nearly linear in
the data (lazy training, arXiv 1812.07956): fields of similar data have similar weights, and their leading principal
components hold what they show. One Jacobian, that of the start, then serves all steps of all fits.

E fields, P points, d dimensions of a point, C channels, R = C · P residuals of a field, W weights, H hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from rpg.labs.fields.config import FieldsConfig
from rpg.seeding import make_rng
from rpg.tasks.side_by_side import Stacked

FREQUENCY = 3.0
"""Factor in the second layer's sines."""

MOST_HIDDEN_VALUES = 1 << 24
"""Hidden values of the fields that are computed at once (64 MiB of float32)."""


class Siren(nn.Module):
    """A field: points ``[P, d]`` in -1 … 1 (row, column, …) → values ``[P, C]``."""

    def __init__(self, config: FieldsConfig, channels: int) -> None:
        super().__init__()
        self.frequencies = config.first_frequency, FREQUENCY
        self.first = nn.Linear(config.dimensions, config.hidden)
        self.hidden = nn.Linear(config.hidden, config.hidden)
        self.last = nn.Linear(config.hidden, channels)

    def forward(self, points: Tensor) -> Tensor:
        """Evaluate the field."""
        first, second = self.frequencies
        hidden = torch.sin(second * self.hidden(torch.sin(first * self.first(points))))  # [P, H]
        return self.last(hidden)  # [P, C]


def grid_points(*sizes: int) -> Tensor:
    """The centres of the cells of a grid that spans -1 … 1 in each of d dimensions, ``[product of sizes, d]``.

    Fields have no resolution: any size is possible.
    """
    axes = [(2 * torch.arange(num) + 1) / num - 1 for num in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def start(config: FieldsConfig, channels: int) -> dict[str, Tensor]:
    """Initial weights of every fit: a field that is 0 everywhere."""
    rng, num = make_rng(config.seed, "field"), config.hidden
    half = num // 2

    def draw(*shape: int, limit: float) -> Tensor:
        return (torch.rand(*shape, generator=rng) * 2 - 1) * limit

    first, second = config.first_frequency, FREQUENCY
    limit = math.sqrt(6 / num) / second
    rows, biases = draw(half, num, limit=limit), draw(half, limit=math.pi / second)
    last = draw(channels, half, limit=config.output_scale * limit)
    return {
        "first.weight": draw(num, config.dimensions, limit=0.5),
        "first.bias": draw(num, limit=math.pi / first),
        "hidden.weight": torch.cat([rows, rows]),
        "hidden.bias": torch.cat([biases, biases]),
        "last.weight": torch.cat([last, -last], 1),
        "last.bias": torch.zeros(channels),
    }


def evaluate(config: FieldsConfig, weights: Stacked, points: Tensor) -> Tensor:
    """Values ``[E, P, C]`` of E fields at shared points ``[P, d]`` or at their own ``[E, P, d]``."""
    chunk = max(1, MOST_HIDDEN_VALUES // (points.shape[-2] * config.hidden))
    total, parts = len(weights["last.bias"]), []
    for first in range(0, total, chunk):
        some = {name: value[first : first + chunk] for name, value in weights.items()}
        x = points[first : first + chunk] if points.dim() == 3 else points
        x = torch.sin(config.first_frequency * _linear(some, "first", x))  # [E, P, H]
        x = torch.sin(FREQUENCY * _linear(some, "hidden", x))  # [E, P, H]
        parts.append(_linear(some, "last", x))
    return torch.cat(parts)


@torch.no_grad()
def fit(config: FieldsConfig, data: Tensor) -> Stacked:
    """Fit fields to data on a grid ``[E, C, *grid]``, close to the shared initial weights.

    Every step solves |y - f - J (w - v)|² + damping · |w - start|² for w, where J is the Jacobian at the start, f the
    values of the weights v, and y the data.
    """
    num, channels = data.shape[:2]
    points, begin = grid_points(*data.shape[2:]), start(config, channels)
    jacobian = _jacobian(config, begin, channels, points)  # [R, W]
    solve = _ridge(jacobian, config.damping)
    wanted = data.reshape(num, -1)  # [E, R]
    moved = torch.zeros(num, jacobian.shape[1])  # w - start
    for _ in range(config.steps):
        shown = evaluate(config, _weights(begin, moved), points).mT.flatten(1)  # [E, R]
        moved = solve(wanted - shown + moved @ jacobian.T)
    return _weights(begin, moved)


def _jacobian(config: FieldsConfig, begin: dict[str, Tensor], channels: int, points: Tensor) -> Tensor:
    """Jacobian of the values with respect to the weights, ``[R, W]``, channel after channel."""
    network = Siren(config, channels)
    slopes = vmap(jacrev(lambda weights, x: functional_call(network, weights, (x,))), in_dims=(None, 0))
    by_name = slopes(begin, points)
    return torch.cat([by_name[name].transpose(0, 1).flatten(0, 1).flatten(1) for name in begin], 1)


def _ridge(jacobian: Tensor, damping: float) -> Callable[[Tensor], Tensor]:
    """Ridge regression: residuals ``[E, R]`` → steps ``[E, W]``, in float64, by the smaller Gram matrix."""
    jacobian = jacobian.double()
    wide = jacobian.shape[0] < jacobian.shape[1]
    gram = jacobian @ jacobian.T if wide else jacobian.T @ jacobian
    gram.diagonal().add_(damping)
    factor = torch.linalg.cholesky(gram)

    def solve(rest: Tensor) -> Tensor:
        wanted = rest.double() if wide else rest.double() @ jacobian
        solved = torch.cholesky_solve(wanted.T, factor).T
        return (solved @ jacobian if wide else solved).float()

    return solve


def _weights(begin: dict[str, Tensor], moved: Tensor) -> Stacked:
    """Fields at the start plus changes ``[E, W]``."""
    parts = moved.split([value.numel() for value in begin.values()], 1)
    return {name: value + part.view(-1, *value.shape) for (name, value), part in zip(begin.items(), parts, strict=True)}


def _linear(weights: Stacked, name: str, x: Tensor) -> Tensor:
    """A linear layer of E networks on ``[P, I]``, or each on its own ``[E, P, I]``: ``[E, P, O]``."""
    return x @ weights[f"{name}.weight"].mT + weights[f"{name}.bias"][:, None]

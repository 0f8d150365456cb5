"""Sinusoidal fields (SIREN, arXiv 2006.09661), many side by side, and their fit by Gauss-Newton steps.

The start is antisymmetric: the second half of the hidden units repeats the first, with the opposite sign in the last
layer. Every field therefore starts as 0, however large the last layer is, and a large one makes fits nearly linear in
the image (lazy training, arXiv 1812.07956): fields of similar images have similar weights, and their leading principal
components hold what they show.

E fields, P points, C channels, R = C · P residuals of a field, H hidden units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rpg.seeding import make_rng
from rpg.tasks.fields.config import FieldsConfig
from rpg.tasks.side_by_side import Stacked

MOST_GRAM_VALUES = 1 << 24
"""Of the Gram matrices of the fields that are fitted at once (64 MiB of float32)."""


class Siren(nn.Module):
    """A field: points ``[P, 2]`` in -1 … 1 (row, column) → values ``[P, C]``.

    Args:
        config: sizes and frequencies.
        channels: C.
    """

    def __init__(self, config: FieldsConfig, channels: int) -> None:
        super().__init__()
        self.frequencies = config.first_frequency, config.frequency
        self.first = nn.Linear(2, config.hidden)
        self.hidden = nn.Linear(config.hidden, config.hidden)
        self.last = nn.Linear(config.hidden, channels)

    def forward(self, points: Tensor) -> Tensor:
        """Evaluate the field."""
        first, second = self.frequencies
        hidden = torch.sin(second * self.hidden(torch.sin(first * self.first(points))))  # [P, H]
        return self.last(hidden)  # [P, C]


def pixel_points(height: int, width: int) -> Tensor:
    """The centres of the pixels of an image that spans -1 … 1, ``[height · width, 2]``: any resolution, one field."""
    rows, columns = ((2 * torch.arange(num) + 1) / num - 1 for num in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)


def start(config: FieldsConfig, channels: int) -> dict[str, Tensor]:
    """The weights that every fit starts from: a field that is 0 everywhere."""
    rng, num = make_rng(config.seed, "field"), config.hidden
    half = num // 2

    def draw(*shape: int, limit: float) -> Tensor:
        return (torch.rand(*shape, generator=rng) * 2 - 1) * limit

    first, second = config.first_frequency, config.frequency
    limit = math.sqrt(6 / num) / second
    rows, biases = draw(half, num, limit=limit), draw(half, limit=math.pi / second)
    last = draw(channels, half, limit=config.output_scale * limit)
    return {
        "first.weight": draw(num, 2, limit=0.5),
        "first.bias": draw(num, limit=math.pi / first),
        "hidden.weight": torch.cat([rows, rows]),
        "hidden.bias": torch.cat([biases, biases]),
        "last.weight": torch.cat([last, -last], 1),
        "last.bias": torch.zeros(channels),
    }


def evaluate(config: FieldsConfig, weights: Stacked, points: Tensor) -> Tensor:
    """The values of E fields ``[E, P, C]`` at points ``[P, 2]``."""
    first = torch.sin(config.first_frequency * _linear(weights, "first", points))  # [E, P, H]
    hidden = torch.sin(config.frequency * _linear(weights, "hidden", first))  # [E, P, H]
    return _linear(weights, "last", hidden)


@torch.no_grad()
def fit(config: FieldsConfig, images: Tensor) -> Stacked:
    """Fields of images ``[E, C, S, S]`` from the shared start: of all that show them, nearly the nearest to it."""
    num, channels, height, width = images.shape
    points = pixel_points(height, width)
    begin = start(config, channels)
    wanted = images.reshape(num, -1)  # [E, C · P]
    chunk = max(1, MOST_GRAM_VALUES // wanted.shape[1] ** 2)
    parts = []
    for part in wanted.split(chunk):
        weights = {name: value.expand(len(part), *value.shape) for name, value in begin.items()}
        for _ in range(config.steps):
            weights = _gauss_newton(config, begin, weights, points, part)
        parts.append(weights)
    return {name: torch.cat([part[name] for part in parts]) for name in begin}


def _gauss_newton(
    config: FieldsConfig, begin: dict[str, Tensor], weights: Stacked, points: Tensor, wanted: Tensor
) -> Stacked:
    """Of all weights that the field, taken as linear in them, shows ``wanted`` ``[E, R]`` with: the nearest to the
    start, up to the damping. The Jacobian itself is never made, only its Gram matrix and its products."""
    channels = len(begin["last.bias"])
    before_first = _linear(weights, "first", points)  # [E, P, H]
    first = torch.sin(config.first_frequency * before_first)
    before_hidden = _linear(weights, "hidden", first)
    hidden = torch.sin(config.frequency * before_hidden)  # [E, P, H]
    slope = config.frequency * torch.cos(config.frequency * before_hidden)
    # What each value changes by with each unit's sum, channel after channel, [E, R, H].
    to_hidden = torch.cat([slope * weights["last.weight"][:, None, c] for c in range(channels)], 1)
    slope = config.first_frequency * torch.cos(config.first_frequency * before_first)
    to_first = (to_hidden @ weights["hidden.weight"]) * slope.repeat(1, channels, 1)
    inputs, features = points.repeat(channels, 1), first.repeat(1, channels, 1)
    own = torch.block_diag(*[torch.ones(len(points), len(points))] * channels)  # channels share no last weights
    last = hidden.repeat(1, channels, 1)
    gram = own * (last @ last.mT + 1)
    gram = gram + (features @ features.mT + 1) * (to_hidden @ to_hidden.mT)
    gram = gram + (inputs @ inputs.T + 1) * (to_first @ to_first.mT)  # [E, R, R]
    moved = {name: value - begin[name] for name, value in weights.items()}
    already = (_linear(moved, "first", inputs) * to_first).sum(-1)
    already = already + (_linear(moved, "hidden", features) * to_hidden).sum(-1)
    already = already + _linear(moved, "last", hidden).mT.flatten(1)
    shown = _linear(weights, "last", hidden).mT.flatten(1)  # [E, R]
    rest = wanted - shown + already
    damping = config.damping * torch.eye(gram.shape[-1])
    factors = torch.linalg.solve(gram + damping, rest[..., None])  # [E, R, 1]
    by_hidden, by_first = factors * to_hidden, factors * to_first
    by_channel = factors.view(len(wanted), channels, -1)  # [E, C, P]
    steps = {
        "first.weight": by_first.mT @ inputs,
        "first.bias": by_first.sum(1),
        "hidden.weight": by_hidden.mT @ features,
        "hidden.bias": by_hidden.sum(1),
        "last.weight": by_channel @ hidden,
        "last.bias": by_channel.sum(-1),
    }
    return {name: begin[name] + step for name, step in steps.items()}


def _linear(weights: Stacked, name: str, x: Tensor) -> Tensor:
    """A linear layer of E networks on ``[P, I]``, or each on its own ``[E, P, I]``: ``[E, P, O]``."""
    return x @ weights[f"{name}.weight"].mT + weights[f"{name}.bias"][:, None]

"""A set of examples as a condition: any number of them, labelled or not, in any order.

A deep set (arXiv 1703.06114): features of each example, averaged by class and over all, with the largest of each.

B sets, n examples of a set, P values of an example, K classes, F features, H width.
"""

from __future__ import annotations

import itertools

import torch
from einops import rearrange
from torch import Tensor, nn

NUM_FEATURES, WIDTH = 64, 256
"""F, and of the layers after pooling."""


def row_size(num_values: int, num_classes: int) -> int:
    """How many numbers stand for an example: its values, its class one-hot (zeros if unknown), and 1."""
    return num_values + num_classes + 1


def example_rows(values: Tensor, classes: Tensor | None, num_classes: int) -> Tensor:
    """Examples as numbers, ``[…, n, P + K + 1]``.

    Args:
        values: ``[…, n, P]``.
        classes: ``[…, n]`` long, -1 where a class is unknown; None where all are.
        num_classes: K.
    """
    known = values.new_zeros(*values.shape[:-1], num_classes)
    if classes is not None:
        known.scatter_(-1, classes.clamp(min=0)[..., None], (classes >= 0)[..., None].to(values))
    return torch.cat([values, known, values.new_ones(*values.shape[:-1], 1)], -1)


class SetEncoder(nn.Module):
    """Sets of examples as vectors.

    Args:
        size: P + K + 1.
        num_classes: K.
        width: H.
        depth: hidden layers after what is known of single ones is pooled.
    """

    def __init__(self, size: int, num_classes: int, width: int, depth: int = 1) -> None:
        super().__init__()
        self.size, self.num_classes, self.width = size, num_classes, width
        num_values = size - num_classes - 1
        inner = 2 * NUM_FEATURES
        # Phrases (without classes) need a deeper network than images, and one without corners: docs/log.md.
        activation = nn.ReLU if num_classes else nn.SiLU
        middle = [] if num_classes else [nn.Linear(inner, inner), activation()]
        self.each = nn.Sequential(
            nn.Linear(num_values, inner), activation(), *middle, nn.Linear(inner, NUM_FEATURES)
        )  # fmt: skip
        num_inputs = (num_classes + 2) * NUM_FEATURES + num_classes + 1
        sizes = [num_inputs, *[WIDTH] * depth]
        layers = [each for pair in itertools.pairwise(sizes) for each in (nn.Linear(*pair), activation())]
        self.all = nn.Sequential(*layers, nn.Linear(sizes[-1], width))

    def forward(self, sets: Tensor) -> Tensor:
        """Vectors ``[B, H]`` of sets ``[B, n · (P + K + 1)]``; rows whose last number is 0 are padding."""
        rows = rearrange(sets, "b (n row) -> b n row", row=self.size)
        values, classes, there = rows.split([self.size - self.num_classes - 1, self.num_classes, 1], -1)
        features = values.new_zeros(*values.shape[:2], NUM_FEATURES)  # [B, n, F]
        known = there[..., 0] > 0
        features[known] = self.each(values[known]).to(features)  # padding costs nothing
        sums = classes.mT.to(features) @ features  # [B, K, F]
        counts = classes.sum(1)  # [B, K]
        by_class = sums / counts.clamp(min=1)[..., None]  # zero where a class is missing
        total = there.sum(1).clamp(min=1)  # [B, 1]
        mean = (features * there).sum(1) / total
        largest = features.masked_fill(there == 0, -torch.inf).amax(1)
        return self.all(torch.cat([by_class.flatten(1), mean, largest, counts.clamp(max=1), 1 / total], -1))

"""Random small changes of training images: shifts, turns, sizes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(
    images: Tensor, generator: torch.Generator, *, shift: float = 0.8, angle: float = 12.0, scale: float = 0.12,
    fill: float = 0.0,
) -> Tensor:  # fmt: skip
    """Each image moved, turned and scaled at random, by bilinear sampling.

    Args:
        images: ``[B, C, H, W]``.
        generator: source of the draws.
        shift: largest shift in pixels, along each axis.
        angle: largest turn in degrees.
        scale: largest relative change of size, along each axis of its own.
        fill: value outside the image.
    """
    num, _, height, width = images.shape

    def draw(limit: float) -> Tensor:
        return (torch.rand(num, generator=generator) * 2 - 1) * limit

    turn = draw(math.radians(angle))
    stretch_x, stretch_y = 1 + draw(scale), 1 + draw(scale)
    move_x, move_y = draw(2 * shift / width), draw(2 * shift / height)
    cos, sin = turn.cos(), turn.sin()
    matrix = torch.stack(
        [
            torch.stack([cos * stretch_x, -sin * stretch_x, move_x], 1),
            torch.stack([sin * stretch_y, cos * stretch_y, move_y], 1),
        ],
        1,
    )  # [B, 2, 3]
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images - fill, grid, mode="bilinear", align_corners=False) + fill

"""Shaded views of solid shapes, straight from their fields: parallel rays, the first crossing, light from one side.

T fields, S pixels along each edge, D samples along a ray.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rpg.tasks.fields.siren import grid_points

TURN, TILT = math.radians(35), math.radians(28)
"""The viewer goes around the z axis, and up."""
LIGHT = (-0.4, 0.55, 0.75)
"""Direction to the light, in the viewer's axes: right, up, towards the viewer."""
REACH, SAMPLES, SLOPE = 1.25, 64, 0.01
"""Half the width of the view; samples along each ray; distance over which the surface's slope is taken."""


def axes() -> Tensor:
    """The viewer's right, up and forward (towards the viewer) as unit vectors, ``[3, 3]``."""
    sideways = torch.tensor([-math.sin(TURN), math.cos(TURN), 0.0])
    towards = torch.tensor([math.cos(TURN) * math.cos(TILT), math.sin(TURN) * math.cos(TILT), math.sin(TILT)])
    return torch.stack([sideways, torch.linalg.cross(towards, sideways), towards])


def views(values: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Draw T solid shapes.

    Args:
        values: points ``[P, 3]``, or of each field its own ``[T, P, 3]`` → values ``[T, P]``, positive inside.
        size: S.

    Returns:
        ``[T, 1, S, S]`` in ink: 0 where there is nothing, more in the shade.
    """
    right, up, towards = axes()
    across = grid_points(size, size)  # row, column
    origins = REACH * (across[:, 1:] * right - across[:, :1] * up)  # [S², 3]
    depths = REACH * torch.linspace(1, -1, SAMPLES)
    points = origins[:, None] + depths[:, None] * towards  # [S², D, 3]
    within = points.abs().amax(-1) <= 1
    shown = values(points.flatten(0, 1)).view(-1, size * size, SAMPLES)
    shown = torch.where(within, shown, -1.0)  # [T, S², D]
    inside = shown > 0
    hit, first = inside.any(-1), inside.float().argmax(-1)  # [T, S²]
    before = (first - 1).clamp(min=0)
    now, then = (shown.gather(-1, each[..., None])[..., 0] for each in (first, before))
    share = (now / (now - then).clamp(min=1e-6)).clamp(0, 1)  # of the way back to the sample outside
    depth = depths[first] + share * (depths[before] - depths[first])
    surface = (origins + depth[..., None] * towards).clamp(-1, 1)  # [T, S², 3]
    slopes = [values(surface - SLOPE * axis) - values(surface + SLOPE * axis) for axis in torch.eye(3)]
    normals = torch.nn.functional.normalize(torch.stack(slopes, -1), dim=-1)  # outwards
    light = torch.nn.functional.normalize(torch.tensor(LIGHT), dim=0) @ torch.stack([right, up, towards])
    ink = 0.85 - 0.7 * (normals @ light).clamp(min=0)
    return torch.where(hit, ink, 0.0).view(-1, 1, size, size)

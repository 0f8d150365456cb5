"""Solid shapes by signed distances: random ones of six classes, and any folder of meshes.

A shape is a function of points ``[..., 3]`` in -1 … 1, negative inside. Primitives and their combinations by least and
greatest (union, intersection) are Quílez's distance functions (iquilezles.org/articles/distfunctions); a combination
is exact at the surface and a bound elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Shape = Callable[[Tensor], Tensor]
"""Points ``[..., 3]`` → signed distances ``[...]``."""

Draw = Callable[[float, float], float]
"""A random number between two bounds."""


def box(points: Tensor, *half: float) -> Tensor:
    """A box around the origin, by half its edges."""
    beyond = points.abs() - torch.tensor(half)
    return beyond.clamp(min=0).norm(dim=-1) + beyond.amax(-1).clamp(max=0)


def ball(points: Tensor, radius: float) -> Tensor:
    """A ball around the origin."""
    return points.norm(dim=-1) - radius


def cylinder(points: Tensor, radius: float, half: float) -> Tensor:
    """A cylinder along z."""
    beyond = torch.stack([points[..., :2].norm(dim=-1) - radius, points[..., 2].abs() - half], -1)
    return beyond.clamp(min=0).norm(dim=-1) + beyond.amax(-1).clamp(max=0)


def torus(points: Tensor, radius: float, thickness: float) -> Tensor:
    """A torus around z."""
    return torch.hypot(points[..., :2].norm(dim=-1) - radius, points[..., 2]) - thickness


def moved(points: Tensor, *by: float) -> Tensor:
    """The points as a part sees them that is moved by so much."""
    return points - torch.tensor(by)


def union(*parts: Tensor) -> Tensor:
    """What is inside of any part."""
    return torch.stack(parts).amin(0)


def without(shape: Tensor, hole: Tensor) -> Tensor:
    """What is inside of the one and outside of the other."""
    return torch.maximum(shape, -hole)


def _legs(points: Tensor, wide: float, deep: float, half: float, thick: float, top: float) -> Tensor:
    mirrored = torch.cat([points[..., :2].abs(), points[..., 2:]], -1)
    return box(moved(mirrored, wide - thick, deep - thick, top - half), thick, thick, half)


def _table(draw: Draw) -> Shape:
    wide, deep, high, thick, leg = draw(0.5, 0.7), draw(0.4, 0.6), draw(0.35, 0.7), draw(0.1, 0.16), draw(0.1, 0.16)
    return lambda p: union(box(moved(p, 0, 0, high), wide, deep, thick), _legs(p, wide, deep, high, leg, high))


def _chair(draw: Draw) -> Shape:
    wide, deep, leg, thick = draw(0.35, 0.6), draw(0.35, 0.6), draw(0.25, 0.4), draw(0.1, 0.14)
    back, post = draw(0.3, 0.45), draw(0.1, 0.14)
    seat = draw(-0.2, 0.0)
    return lambda p: union(
        box(moved(p, 0, 0, seat), wide, deep, thick),
        _legs(p, wide, deep, leg, post, seat),
        box(moved(p, 0, thick - deep, seat + back), wide, thick, back),
    )


def _mug(draw: Draw) -> Shape:
    radius, high, wall = draw(0.4, 0.6), draw(0.4, 0.75), draw(0.1, 0.15)
    handle, thick = draw(0.2, 0.32), draw(0.08, 0.12)
    return lambda p: without(
        union(
            cylinder(p, radius, high),
            torus(moved(p, radius, 0, 0)[..., [0, 2, 1]], handle, thick),
        ),
        cylinder(moved(p, 0, 0, 2 * wall), radius - wall, high),
    )


def _dumbbell(draw: Draw) -> Shape:
    long, rod, first, second = draw(0.4, 0.55), draw(0.1, 0.18), draw(0.22, 0.4), draw(0.22, 0.4)
    return lambda p: union(
        cylinder(p[..., [2, 1, 0]], rod, long), ball(moved(p, long, 0, 0), first), ball(moved(p, -long, 0, 0), second)
    )


def _ring(draw: Draw) -> Shape:
    radius, thick, tilt = draw(0.45, 0.65), draw(0.12, 0.25), draw(0, math.pi / 3)
    turn = torch.tensor([[1, 0, 0], [0, math.cos(tilt), -math.sin(tilt)], [0, math.sin(tilt), math.cos(tilt)]])
    return lambda p: torus(p @ turn, radius, thick)


def _nut(draw: Draw) -> Shape:
    radius, high, hole = draw(0.5, 0.75), draw(0.2, 0.5), draw(0.35, 0.6)
    normals = torch.tensor([[math.cos(k * math.pi / 3), math.sin(k * math.pi / 3)] for k in range(3)])

    def shape(p: Tensor) -> Tensor:
        prism = torch.maximum((p[..., :2] @ normals.T).abs().amax(-1) - radius, p[..., 2].abs() - high)
        return without(prism, p[..., :2].norm(dim=-1) - hole * radius)

    return shape


CLASSES: dict[str, Callable[[Draw], Shape]] = {
    "chair": _chair, "dumbbell": _dumbbell, "mug": _mug, "nut": _nut, "ring": _ring, "table": _table
}  # fmt: skip


def random_shape(name: str, rng: torch.Generator) -> Shape:
    """A shape of a class, its proportions drawn and turned around z by up to 30 degrees either way."""

    def draw(least: float, most: float) -> float:
        return least + (most - least) * torch.rand((), generator=rng).item()

    shape, angle = CLASSES[name](draw), draw(-math.pi / 6, math.pi / 6)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    return lambda points: shape(points @ turn)

"""Solid shapes by signed distances: random ones of six classes, and any folder of meshes.

A shape is a function of points ``[..., 3]`` in -1 … 1, negative inside. Primitives and their combinations by least and
greatest (union, intersection) are Quílez's distance functions (iquilezles.org/articles/distfunctions); a combination
is exact on the surface and a bound elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from rpg.packages import install_command
from tokenization.errors import InputError
from tokenization.files import atomic_file

Shape = Callable[[Tensor], Tensor]
"""Points ``[..., 3]`` → signed distances ``[...]``."""

Draw = Callable[[float, float], float]
"""A random number between two bounds."""


def box(points: Tensor, *half: float) -> Tensor:
    """A box around the origin, given half its edge lengths."""
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
    """Points in the coordinates of a part that is moved by the offset."""
    return points - torch.tensor(by)


def union(*parts: Tensor) -> Tensor:
    """Union of parts."""
    return torch.stack(parts).amin(0)


def without(shape: Tensor, hole: Tensor) -> Tensor:
    """Difference: inside the first, outside the second."""
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
        union(cylinder(p, radius, high), torus(moved(p, radius, 0, 0)[..., [0, 2, 1]], handle, thick)),
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
    """A shape of a class with random proportions, rotated around z by up to ±30 degrees."""

    def draw(least: float, most: float) -> float:
        return least + (most - least) * torch.rand((), generator=rng).item()

    shape, angle = CLASSES[name](draw), draw(-math.pi / 6, math.pi / 6)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    return lambda points: shape(points @ turn)


EDGE = 0.8
"""Half of the longest edge of a mesh's bounding box, once it is moved and scaled to lie in -1 … 1."""
SAMPLES, CANDIDATES = 20_000, 8
"""Points sampled on a surface besides its triangles' centres, and the number of nearest samples whose triangles are
checked for the distance."""
MOST_ANGLES = 1 << 22
"""Number of solid angles computed at once."""


def mesh_distances(file: Path, points: Tensor) -> Tensor:
    """Signed distances ``[P]`` of points ``[P, 3]`` to the surface of a mesh file, negative inside.

    The mesh is moved and scaled to fit -1 … 1. Points are inside if the winding number (Jacobson et al., 2013,
    doi 10.1145/2461912.2461916) exceeds 1 / 2, which is robust to small holes. Raises InputError if the file holds no
    mesh, or one that encloses nothing.
    """
    trimesh = _trimesh()
    try:
        mesh = trimesh.load_mesh(file, process=True)
        triangles = np.asarray(mesh.triangles, dtype=np.float64)  # [F, 3, 3]
    except Exception as error:  # each format's reader has errors of its own
        raise InputError(
            f"{file} cannot be read as a mesh ({error}); replace it or take it out of the folder"
        ) from error
    if len(triangles) == 0 or not np.isfinite(triangles).all() or np.ptp(triangles, (0, 1)).max() == 0:
        raise InputError(f"{file} holds no triangles with finite corners; replace it or take it out of the folder")
    least, most = triangles.min((0, 1)), triangles.max((0, 1))
    triangles = (triangles - (least + most) / 2) * (2 * EDGE / (most - least).max())
    where = points.numpy().astype(np.float64)
    inside = np.abs(_winding_numbers(triangles, where)) > 0.5
    if not inside.any():
        raise InputError(f"{file} encloses nothing; fields of shapes need closed surfaces, so close its holes")
    distances = _distances(triangles, where)
    return torch.from_numpy(np.where(inside, -distances, distances)).float()


def _distances(triangles: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distance to the nearest point of the triangles that contain the nearest samples."""
    trimesh = _trimesh()
    mesh = trimesh.Trimesh(triangles.reshape(-1, 3), np.arange(3 * len(triangles)).reshape(-1, 3), process=False)
    samples, faces = trimesh.sample.sample_surface(mesh, SAMPLES, seed=0)
    _, nearest = cKDTree(np.concatenate([samples, triangles.mean(1)])).query(points, k=CANDIDATES)
    chosen = triangles[np.concatenate([faces, np.arange(len(triangles))])[nearest]]  # [P, K, 3, 3]
    repeated = np.repeat(points[:, None], CANDIDATES, 1)
    closest = trimesh.triangles.closest_point(chosen.reshape(-1, 3, 3), repeated.reshape(-1, 3))
    return np.linalg.norm(closest.reshape(repeated.shape) - repeated, axis=-1).min(1)


def _winding_numbers(triangles: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Winding number of each point ``[P]``: solid angle over 4 π (van Oosterom and Strackee, 1983)."""
    found = []
    for part in np.array_split(points, max(1, len(points) * len(triangles) // MOST_ANGLES)):
        a, b, c = np.moveaxis(triangles[None] - part[:, None, None], 2, 0)  # [P, F, 3] each
        lengths = [np.linalg.norm(each, axis=-1) for each in (a, b, c)]
        volume = (a * np.cross(b, c)).sum(-1)
        rest = lengths[0] * lengths[1] * lengths[2]
        rest = rest + (a * b).sum(-1) * lengths[2] + (b * c).sum(-1) * lengths[0] + (c * a).sum(-1) * lengths[1]
        found.append(np.arctan2(volume, rest).sum(-1) / (2 * np.pi))
    return np.concatenate(found)


def write_mesh(values: Tensor, path: Path) -> None:
    """Write the surface of a solid shape as a PLY file, by marching cubes (Lorensen and Cline, 1987).

    ``values`` ``[S, S, S]`` are at the centres of the cells of -1 … 1. Raises InputError if none is positive, inside.
    """
    trimesh = _trimesh()
    from skimage.measure import marching_cubes

    size = len(values)
    if not (values > 0).any():
        raise InputError(f"{path.stem} shows no surface, so that no {path.name} can be written")
    closed = np.pad(values.numpy(), 1, constant_values=-1.0)  # a shape that leaves the grid is cut off there
    corners, faces, _, _ = marching_cubes(closed, 0.0, gradient_direction="ascent")
    mesh = trimesh.Trimesh((2 * (corners - 1) + 1) / size - 1, faces, process=False)
    with atomic_file(path) as temporary:
        Path(temporary).write_bytes(mesh.export(file_type="ply"))


def _trimesh():  # type: ignore[no-untyped-def]
    try:
        import trimesh
    except ImportError as error:
        cure = f"run {install_command('trimesh', 'scikit-image')}"
        raise InputError(f"meshes need trimesh and scikit-image, which are not installed; {cure}") from error
    return trimesh

"""From a mesh file to signed distances, and from a field to a mesh (marching cubes). Needs trimesh and scikit-image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from rpg.packages import install_command
from tokenization.errors import InputError
from tokenization.files import atomic_file

EDGE = 0.8
"""Half of the longest edge of a mesh's bounding box, once it is moved and scaled to lie in -1 … 1."""
SAMPLES, CANDIDATES = 20_000, 8
"""Points sampled on a surface, beside its triangles' centres, and how many of the nearest ones' triangles are looked at
for the distance."""
MOST_ANGLES = 1 << 22
"""Solid angles that are computed at once."""


def mesh_distances(file: Path, points: Tensor) -> Tensor:
    """Signed distances ``[P]`` of points ``[P, 3]`` to the surface of a mesh file, negative inside.

    The mesh is moved and scaled to fit -1 … 1. Inside is where its winding number (Jacobson et al., 2013,
    doi 10.1145/2461912.2461916) exceeds 1 / 2, which small holes do not disturb.

    Raises:
        InputError: the file holds no mesh, or one that encloses nothing.
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
    """To the nearest point of some triangles: those on which the nearest of many samples lie."""
    trimesh = _trimesh()
    mesh = trimesh.Trimesh(triangles.reshape(-1, 3), np.arange(3 * len(triangles)).reshape(-1, 3), process=False)
    samples, faces = trimesh.sample.sample_surface(mesh, SAMPLES, seed=0)
    _, nearest = cKDTree(np.concatenate([samples, triangles.mean(1)])).query(points, k=CANDIDATES)
    chosen = triangles[np.concatenate([faces, np.arange(len(triangles))])[nearest]]  # [P, K, 3, 3]
    repeated = np.repeat(points[:, None], CANDIDATES, 1)
    closest = trimesh.triangles.closest_point(chosen.reshape(-1, 3, 3), repeated.reshape(-1, 3))
    return np.linalg.norm(closest.reshape(repeated.shape) - repeated, axis=-1).min(1)


def _winding_numbers(triangles: np.ndarray, points: np.ndarray) -> np.ndarray:
    """How often a surface goes around each point ``[P]``: solid angle over 4 π (van Oosterom and Strackee, 1983)."""
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

    Args:
        values: ``[S, S, S]`` at the centres of the cells of -1 … 1, positive inside.
        path: the file.

    Raises:
        InputError: nothing is inside.
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

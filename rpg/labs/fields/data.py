"""Data for fields: scikit-learn's digits, solid shapes, or a folder of images or meshes; and their altered copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rpg.labs.fields.config import FieldsConfig
from rpg.labs.fields.shapes import CLASSES, Shape, mesh_distances, random_shape
from rpg.labs.fields.siren import grid_points
from rpg.seeding import make_rng, permutation
from rpg.tasks.images.digits import load_splits
from rpg.tasks.images.image_cache import IMAGES, class_files, read_images
from tokenization.errors import InputError

TRUNCATION = 0.3
"""Fields of shapes represent tanh(-signed distance / TRUNCATION)."""

ALTERATION = 2.0
"""Strength of alterations; 1 is a rotation by 3 degrees (standard deviation)."""

MESHES = {".ply", ".obj", ".stl"}
DIGIT_SPLITS = {"train": "train", "validation": "validation", "unseen": "test"}


@dataclass(frozen=True)
class FieldData:
    """Values on a grid, with classes and splits.

    Attributes:
        values: ``[n, C, S, S]`` in 0 … 1 of images; ``[n, 1, S, S, S]`` of shapes, their truncated signed distances in
            -1 … 1, positive inside.
        labels: int64 ``[n]``.
        splits: ``train``, ``validation`` or ``unseen`` for each datum.
    """

    values: Tensor
    labels: Tensor
    splits: list[str]
    class_names: tuple[str, ...]

    @property
    def size(self) -> int:
        """S, the number of grid points along each edge."""
        return self.values.shape[-1]


def load_data(config: FieldsConfig) -> FieldData:
    """The data of a configuration. Raises InputError if a folder has no classes or a file cannot be used."""
    if config.data == "digits":
        return _digits()
    return _shapes(config) if config.data == "shapes" else _folder(config)


def _digits() -> FieldData:
    digits = load_splits()
    images = torch.cat([digits.images[part] for part in DIGIT_SPLITS.values()])
    labels = torch.cat([digits.labels[part] for part in DIGIT_SPLITS.values()])
    splits = [split for split, part in DIGIT_SPLITS.items() for _ in digits.labels[part]]
    least, most = images.amin(), images.amax()  # paper and full ink
    return FieldData((images - least) / (most - least), labels, splits, tuple(map(str, range(10))))


def _shapes(config: FieldsConfig) -> FieldData:
    names, labels = tuple(CLASSES), torch.arange(config.num_shapes) % len(CLASSES)
    shapes = [
        random_shape(names[label], make_rng(config.seed, "shape", number))
        for number, label in enumerate(labels.tolist())
    ]
    return FieldData(_sampled(shapes, config), labels, _split(config.num_shapes, config), names)


def _sampled(shapes: Sequence[Shape], config: FieldsConfig) -> Tensor:
    """Values ``[n, 1, S, S, S]`` of the fields of shapes, each given by its signed distances."""
    grid = [config.image_size] * 3
    points = grid_points(*grid)
    return torch.tanh(-torch.stack([shape(points) for shape in shapes]) / TRUNCATION).view(-1, 1, *grid)


def _folder(config: FieldsConfig) -> FieldData:
    kind, suffixes = {2: ("image", IMAGES), 3: ("mesh", MESHES)}[config.dimensions]
    paths, labels, classes = class_files(Path(config.data), kind, suffixes)
    if config.dimensions == 2:
        values = read_images(paths, config.image_size)
    else:
        values = _sampled([partial(mesh_distances, file) for file in paths], config)
    return FieldData(values, torch.tensor(labels), _split(len(paths), config), tuple(classes))


def _split(num: int, config: FieldsConfig) -> list[str]:
    """The split of each datum, at random."""
    num_unseen = max(2, round(config.held_out * num))
    num_validation = max(2, round(config.validation * (num - num_unseen)))
    if num < num_unseen + num_validation + 2:
        raise InputError(f"{config.data} holds {num} files, too few to hold some out; put at least 8 there")
    splits = ["train"] * num
    for rank, place in enumerate(permutation(num, config.seed, "splits").tolist()):
        if rank < num_unseen + num_validation:
            splits[place] = "unseen" if rank < num_unseen else "validation"
    return splits


def alter(values: Tensor, config: FieldsConfig, copy: int) -> Tensor:
    """Randomly translated, rotated, sheared and scaled copies of data ``[n, C, *grid]``, by interpolation."""
    num, size, dimensions = len(values), values.shape[-1], values.dim() - 2
    rng = make_rng(config.seed, "alteration", copy)
    if dimensions == 2:
        normal = torch.randn(6, num, generator=rng) * ALTERATION
        turn, slant = 0.06 * normal[0], 0.06 * normal[1]
        wide, high = 1 + 0.03 * normal[2], 1 + 0.03 * normal[3]
        move = 0.3 / size * normal[4:]  # 0.15 pixels; the image is 2 wide
        rows = [wide * turn.cos(), slant - turn.sin(), move[0]], [turn.sin(), high * turn.cos(), move[1]]
        matrices = torch.stack([torch.stack(row, -1) for row in rows], 1)
    else:
        matrices = torch.eye(3, 4) + 0.04 * ALTERATION * torch.randn(num, 3, 4, generator=rng)
    grid = F.affine_grid(matrices, list(values.shape), align_corners=False)
    mode = "bicubic" if dimensions == 2 else "bilinear"
    shown = F.grid_sample(values, grid, mode=mode, padding_mode="border", align_corners=False)
    return shown.clamp(0, 1) if dimensions == 2 else shown

"""Image classification: splits of images, and the predictions of many state dicts on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from tokenization.compressed.form import dense
from tokenization.errors import InputError


@dataclass(frozen=True)
class ImageSplits:
    """Images and labels by split (``train``, ``validation``, ``test``).

    Attributes:
        images: float32 [n, C, S, S], standardised with the statistics of the training images alone.
        labels: int64 [n].
        mean, std: of the training images' values before they were standardised.
    """

    images: dict[str, Tensor]
    labels: dict[str, Tensor]
    num_classes: int
    mean: float = 0.0
    std: float = 1.0

    def check(self, split: str) -> str:
        """Return ``split`` if it exists. Raises InputError otherwise."""
        if split not in self.images:
            raise InputError(f"there is no split {split!r}; choose one of {', '.join(self.images)}")
        return split

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.images["train"].shape[1:]
        return channels, height, width


def predict_images(network: nn.Module, state_dicts: Iterable[Mapping[str, Tensor]], images: Tensor) -> Tensor:
    """The answers int64 ``[num, n]`` of networks of one structure on the same images ``[n, C, S, S]``.

    A plain loop: for networks of this size it is faster on CPU than ``vmap``, which turns convolutions into grouped
    ones, and it holds one network at a time. Errors as of `logits_of`.
    """
    predictions = [answers(logits_of(network, each, images, f"network {i}")) for i, each in enumerate(state_dicts)]
    return torch.stack(predictions) if predictions else torch.empty(0, len(images), dtype=torch.long)


def logits_of(network: nn.Module, state_dict: Mapping[str, Tensor], images: Tensor, where: str) -> Tensor:
    """Logits ``[n, classes]`` of one state dict, in the network's dtype.

    Raises InputError, naming the tensor, if it does not fit the network, whose own weights do not matter.
    """
    expected = network.eval().state_dict()
    if state_dict.keys() != expected.keys():  # pruned or quantised weights have tensors of their own
        state_dict = dense(state_dict)
    check_structure(state_dict, expected, where)
    weights = {name: state_dict[name].to(like.dtype) for name, like in expected.items()}
    with torch.no_grad():
        return functional_call(network, weights, (images,))


def answers(logits: Tensor) -> Tensor:
    """The class of the largest logit, [n, classes] → [n]; 0 where one is not finite, since nothing was decided."""
    return logits.argmax(1).where(logits.isfinite().all(1), 0)


def check_structure(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Raise InputError, naming the first tensor at fault, unless names and shapes are as expected."""
    for name, like in expected.items():
        if name not in state_dict:
            raise InputError(
                f"{where} has no tensor {name!r} of shape {tuple(like.shape)}; give networks of the task's structure"
            )
        if state_dict[name].shape != like.shape:
            raise InputError(
                f"{where}: tensor {name!r} has the shape {tuple(state_dict[name].shape)} where the task's network has "
                f"{tuple(like.shape)}; give networks of its structure"
            )
    extra = [name for name in state_dict if name not in expected]
    if extra:
        raise InputError(
            f"{where} has a tensor {extra[0]!r}, which the task's network lacks; give networks of its structure"
        )


SHIFT, ANGLE, SCALE = 0.8, 12.0, 0.12
"""The largest alterations: pixels along each axis, degrees, and relative change of size along each axis."""


def augment(images: Tensor, generator: torch.Generator, *, fill: float = 0.0) -> Tensor:
    """Images ``[B, C, H, W]``, each moved, turned and scaled at random; ``fill`` is the value outside the image."""
    num, _, height, width = images.shape

    def draw(limit: float) -> Tensor:
        return (torch.rand(num, generator=generator) * 2 - 1) * limit

    turn = draw(math.radians(ANGLE))
    stretch_x, stretch_y = 1 + draw(SCALE), 1 + draw(SCALE)
    move_x, move_y = draw(2 * SHIFT / width), draw(2 * SHIFT / height)
    cos, sin = turn.cos(), turn.sin()
    rows = [cos * stretch_x, -sin * stretch_x, move_x], [sin * stretch_y, cos * stretch_y, move_y]
    matrices = torch.stack([torch.stack(row, 1) for row in rows], 1)  # [B, 2, 3]
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images - fill, grid, mode="bilinear", align_corners=False) + fill


IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def class_files(root: Path, kind: str, suffixes: set[str]) -> tuple[list[Path], list[int], list[str]]:
    """The files of a folder that has a folder for every class, the class of each file, and the classes' names.

    Raises InputError if it holds none; ``kind`` names the ``suffixes`` in the message.
    """
    classes = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    files = [
        (f, i) for i, c in enumerate(classes) for f in sorted((root / c).iterdir()) if f.suffix.lower() in suffixes
    ]
    if not files:
        raise InputError(
            f"{root} holds no {kind} files; task.data names a folder with a folder of such files for every class "
            f"({', '.join(sorted(suffixes))})"
        )
    return [file for file, _ in files], [label for _, label in files], classes


def read_images(paths: list[Path], image_size: int) -> Tensor:
    """Image files in 0 … 1, ``[n, C, image_size, image_size]``: of one channel if all are grey, else of three."""
    size = (image_size, image_size)
    opened = [Image.open(file) for file in paths]
    grey = all(each.mode in ("1", "L", "I;16", "LA") for each in opened)
    images = []
    for each in opened:
        pixels = np.array(each.convert("L" if grey else "RGB").resize(size, Image.Resampling.BICUBIC))
        images.append(torch.from_numpy(pixels).view(*size, -1).permute(2, 0, 1).float() / 255)
    return torch.stack(images)

"""Image classification: splits of images, and the predictions of many state dicts on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

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
    """Classify the same images with many networks of one structure.

    A plain loop: for networks of this size it is faster on CPU than ``vmap``, which turns convolutions into grouped
    ones, and it holds one network at a time.

    Args:
        network: the target network, whose own weights do not matter.
        state_dicts: the weights; floating-point values are converted to the network's dtype.
        images: [n, C, S, S].

    Returns:
        int64 [num, n], the class with the greatest logit; class 0 where a logit is NaN or infinite.

    Raises:
        InputError: a state dict does not fit the network; names the tensor.
    """
    predictions = [
        answers(logits_of(network, state_dict, images, f"network {index}"))
        for index, state_dict in enumerate(state_dicts)
    ]
    return torch.stack(predictions) if predictions else torch.empty(0, len(images), dtype=torch.long)


def logits_of(network: nn.Module, state_dict: Mapping[str, Tensor], images: Tensor, where: str) -> Tensor:
    """Logits ``[n, classes]`` of one state dict.

    Raises:
        InputError: it does not fit the network; names the tensor.
    """
    expected = network.eval().state_dict()
    if state_dict.keys() != expected.keys():  # pruned or quantised weights have tensors of their own
        state_dict = dense(state_dict)
    check_structure(state_dict, expected, where)
    weights = {name: state_dict[name].to(like.dtype) for name, like in expected.items()}
    with torch.no_grad():
        return functional_call(network, weights, (images,))


def answers(logits: Tensor) -> Tensor:
    """The class of the largest logit, [n, classes] → [n].

    A broken network must not look as if it had decided: it answers class 0.
    """
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


def augment(
    images: Tensor, generator: torch.Generator, *, shift: float = 0.8, angle: float = 12.0, scale: float = 0.12,
    fill: float = 0.0,
) -> Tensor:  # fmt: skip
    """Each image moved, turned and scaled at random, by bilinear sampling.

    Args:
        images: ``[B, C, H, W]``.
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


IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def class_files(root: Path, kind: str, suffixes: set[str]) -> tuple[list[Path], list[int], list[str]]:
    """The files of a folder that has a folder for every class, the class of each file, and the classes' names.

    Raises:
        InputError: the folder holds no such file; ``kind`` names the ``suffixes`` in the message.
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
        values = torch.frombuffer(
            bytearray(each.convert("L" if grey else "RGB").resize(size, Image.Resampling.BICUBIC).tobytes()),
            dtype=torch.uint8,
        )
        images.append(values.view(*size, -1).permute(2, 0, 1).float() / 255)
    return torch.stack(images)

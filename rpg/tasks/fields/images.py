"""The images that fields are fitted to: scikit-learn's digits, or a folder; and altered copies of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rpg.seeding import make_rng, permutation
from rpg.tasks.fields.config import FieldsConfig
from rpg.tasks.images.digits import load_splits
from tokenization.errors import InputError

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
DIGIT_SPLITS = {"train": "train", "validation": "validation", "unseen": "test"}


@dataclass(frozen=True)
class FieldImages:
    """Images with classes and splits.

    Attributes:
        images: ``[n, C, S, S]`` in 0 … 1.
        labels: int64 ``[n]``.
        splits: ``train``, ``validation`` or ``unseen``, one an image.
        class_names: what the classes are called.
    """

    images: Tensor
    labels: Tensor
    splits: list[str]
    class_names: tuple[str, ...]


def load_images(config: FieldsConfig) -> FieldImages:
    """The images of a configuration. Raises InputError for a folder without classes of images."""
    return _digits() if config.data == "digits" else _folder(config)


def _digits() -> FieldImages:
    digits = load_splits()
    images = torch.cat([digits.images[part] for part in DIGIT_SPLITS.values()])
    labels = torch.cat([digits.labels[part] for part in DIGIT_SPLITS.values()])
    splits = [split for split, part in DIGIT_SPLITS.items() for _ in digits.labels[part]]
    least, most = images.amin(), images.amax()  # paper and full ink
    return FieldImages((images - least) / (most - least), labels, splits, tuple(map(str, range(10))))


def _folder(config: FieldsConfig) -> FieldImages:
    root = Path(config.data)
    classes = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    files = [(f, i) for i, c in enumerate(classes) for f in sorted((root / c).iterdir()) if f.suffix.lower() in ENDINGS]
    if not files:
        raise InputError(f"{root} holds no images; task.data names a folder with a folder of images for every class")
    size = (config.image_size, config.image_size)
    opened = [Image.open(file) for file, _ in files]
    grey = all(each.mode in ("1", "L", "I;16", "LA") for each in opened)
    images = []
    for each in opened:
        values = torch.frombuffer(
            bytearray(each.convert("L" if grey else "RGB").resize(size, Image.Resampling.BICUBIC).tobytes()),
            dtype=torch.uint8,
        )
        images.append(values.view(*size, -1).permute(2, 0, 1).float() / 255)
    num_unseen = max(2, round(config.held_out * len(files)))
    num_validation = max(2, round(config.validation * (len(files) - num_unseen)))
    if len(files) < num_unseen + num_validation + 2:
        raise InputError(f"{root} holds {len(files)} images, too few to hold some out; put at least 8 there")
    splits = ["train"] * len(files)
    for rank, place in enumerate(permutation(len(files), config.seed, "splits").tolist()):
        if rank < num_unseen + num_validation:
            splits[place] = "unseen" if rank < num_unseen else "validation"
    return FieldImages(torch.stack(images), torch.tensor([label for _, label in files]), splits, tuple(classes))


def alter(images: Tensor, config: FieldsConfig, copy: int) -> Tensor:
    """Each image ``[n, C, S, S]`` moved, turned, slanted and stretched at random, by bicubic interpolation."""
    num, size = len(images), images.shape[-1]
    normal = torch.randn(6, num, generator=make_rng(config.seed, "alteration", copy)) * config.alteration
    turn, slant = 0.06 * normal[0], 0.06 * normal[1]
    wide, high = 1 + 0.03 * normal[2], 1 + 0.03 * normal[3]
    move = 0.3 / size * normal[4:]  # 0.15 pixels; the image is 2 wide
    rows = [
        torch.stack([wide * turn.cos(), slant - turn.sin(), move[0]], -1),
        torch.stack([turn.sin(), high * turn.cos(), move[1]], -1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(0, 1)

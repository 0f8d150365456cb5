"""The images that sensors look at, and what a sensor sees: images turned, scaled, shifted and perhaps inverted.

Images are scikit-learn's digits, CIFAR-10, or a folder of the user's own.
T sensors, B images, C channels, S height and width."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rpg.seeding import permutation
from rpg.tasks.images.cifar10 import Cifar10SubsetsTask
from rpg.tasks.images.config import Cifar10SubsetsConfig
from rpg.tasks.images.digits import MOST, load_splits
from rpg.tasks.images.image_cache import IMAGES, class_files, read_images
from rpg.tasks.images.networks import ImageSplits
from rpg.tasks.sensors.config import SensorsConfig
from tokenization.errors import InputError
from tokenization.zoo.condition import Setting, SettingKind

DECIMALS = {"angle": 1}
"""To how many decimals settings are drawn, if not to three."""


def declared_settings(config: SensorsConfig) -> tuple[Setting, ...]:
    """The settings of the family's sensors; one whose range is a point is none.

    ``angle`` in degrees counter-clockwise, ``scale``, ``shift_right`` and ``shift_down`` in half frames, ``inverted``.
    """
    low, high = config.angle
    kind: SettingKind = "periodic" if high - low == 360 else "real"
    ranges = [
        Setting("angle", low, high, kind, min(max(0.0, low), high)),
        Setting("scale", *config.scale, default=min(max(1.0, config.scale[0]), config.scale[1])),
        Setting("shift_right", -config.shift, config.shift),
        Setting("shift_down", -config.shift, config.shift),
        Setting("inverted", 0.0, 1.0 if config.inverted else 0.0, "boolean"),
    ]
    return tuple(each for each in ranges if each.low < each.high)


def draw_settings(settings: tuple[Setting, ...], num: int, rng: torch.Generator) -> Tensor:
    """Sensors drawn evenly from the ranges, ``[num, settings]``."""
    share = torch.rand(num, len(settings), generator=rng)
    columns = []
    for setting, each in zip(settings, share.unbind(1), strict=True):
        if setting.kind == "boolean":
            columns.append((each < 0.5).float())
        else:
            value = setting.low + (setting.high - setting.low) * each
            columns.append(value.round(decimals=DECIMALS.get(setting.name, 3)))
    return torch.stack(columns, 1)


def seen_by(images: Tensor, settings: tuple[Setting, ...], values: Tensor) -> Tensor:
    """Images as sensors with the settings' ``values`` ``[T, settings]`` see them, ``[T, B, C, S, S]``.

    Images are in 0 … 1, the same for all sensors ``[B, C, S, S]`` or those of each ``[T, B, C, S, S]``. What lies
    outside the image is 0, dark; of an inverted sensor 1.
    """
    num, shape = len(values), images.shape[-4:]
    known = {setting.name: column for setting, column in zip(settings, values.unbind(1), strict=True)}
    zero = values.new_zeros(num)
    turn = torch.deg2rad(known.get("angle", zero))
    scale, right, down = known.get("scale", zero + 1), known.get("shift_right", zero), known.get("shift_down", zero)
    cos, sin = turn.cos() / scale, turn.sin() / scale
    # Where in the image a place of the frame lies: the shift is taken back first, then the turn.
    rows = [cos, -sin, sin * down - cos * right], [sin, cos, -sin * right - cos * down]
    matrices, size = torch.stack([torch.stack(row, 1) for row in rows], 1), shape[-1]
    grid = F.affine_grid(matrices, [num, 1, size, size], align_corners=False)
    layers = images.expand(num, *shape).flatten(1, 2)  # [T, B·C, S, S]: one place of the frame for all of them
    frames = F.grid_sample(layers, grid, align_corners=False).view(num, *shape)
    inverted = known.get("inverted", zero)[:, None, None, None, None]
    return torch.lerp(frames, 1 - frames, inverted)


NUM_VALIDATION = 297
"""Of the digits; 1,000 remain to train on and 500 to report on."""

VALIDATION_SHARE, TEST_SHARE = 0.15, 0.25
"""Of a folder's images; those in ``val`` are all for reporting."""


def load_images(config: SensorsConfig) -> tuple[ImageSplits, tuple[str, ...]]:
    """The images in 0 … 1 by split, and their classes' names. Raises InputError for none, or too few."""
    if config.data == "digits":
        return _digits(config)
    return _cifar10(config) if config.data == "cifar10" else _folder(config)


def _digits(config: SensorsConfig) -> tuple[ImageSplits, tuple[str, ...]]:
    splits = load_splits(config.image_size, NUM_VALIDATION)
    images = {name: ((each * splits.std + splits.mean) / MOST).clamp(0, 1) for name, each in splits.images.items()}
    return _splits(images, splits.labels, 10), tuple(map(str, range(10)))


def _cifar10(config: SensorsConfig) -> tuple[ImageSplits, tuple[str, ...]]:
    task = Cifar10SubsetsTask(Cifar10SubsetsConfig(root=config.root, seed=config.seed))
    images = {name: _resized(each.float() / 255, config.image_size) for name, each in task.data.images.items()}
    return _splits(images, task.data.labels, task.num_classes), task.class_names


def _folder(config: SensorsConfig) -> tuple[ImageSplits, tuple[str, ...]]:
    root = Path(config.data)
    apart = (root / "train").is_dir() and (root / "val").is_dir()
    files, labels, names = class_files(root / "train" if apart else root, "image", IMAGES)
    test_files, test_labels, test_names = class_files(root / "val", "image", IMAGES) if apart else ([], [], names)
    if test_names != names:
        raise InputError(f"{root / 'val'} has other classes than {root / 'train'}; give both a folder for each class")
    images, classes = read_images(files + test_files, config.image_size), torch.tensor(labels + test_labels)
    order = permutation(len(files), config.seed, "images")
    num_test = 0 if apart else round(TEST_SHARE * len(order))
    num_validation = round(VALIDATION_SHARE * len(order))
    if min(num_validation, num_test or 1) < 1:
        raise InputError(f"{root} holds {len(order)} images, too few to keep some apart; put at least 8 there")
    test = torch.arange(len(files), len(classes)) if apart else order[:num_test]
    rows = {"test": test, "validation": order[num_test : num_test + num_validation]}
    rows["train"] = order[num_test + num_validation :]
    split = {name: images[index] for name, index in rows.items()}
    return _splits(split, {name: classes[index] for name, index in rows.items()}, len(names)), tuple(names)


def _resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return torch.nn.functional.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def _splits(images: dict[str, Tensor], labels: dict[str, Tensor], num_classes: int) -> ImageSplits:
    return ImageSplits(images, labels, num_classes, mean=images["train"].mean().item())

"""The images that sensors look at: scikit-learn's digits, CIFAR-10, or a folder of the user's own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rpg.seeding import permutation
from rpg.tasks.images.cifar10 import Cifar10SubsetsTask
from rpg.tasks.images.config import Cifar10SubsetsConfig
from rpg.tasks.images.digits import MOST, load_splits
from rpg.tasks.images.images import IMAGES, ImageSplits, class_files, read_images
from rpg.tasks.sensors.config import SensorsConfig
from tokenization.errors import InputError

NUM_VALIDATION = 297
"""Of the digits; 1,000 remain to train on and 500 to report on."""

VALIDATION_SHARE, TEST_SHARE = 0.15, 0.25
"""Of a folder's images; those in ``val`` are all for reporting."""


def load_images(config: SensorsConfig) -> tuple[ImageSplits, tuple[str, ...]]:
    """The images in 0 … 1 by split, and the names of their classes; ``mean`` is that of the training images.

    Raises:
        InputError: there are none, or too few.
    """
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

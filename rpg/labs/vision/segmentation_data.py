"""Segmentation data: digits on canvases, ADE20K, and Pascal VOC, each in its archive's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from rpg.labs.vision.config import SegmentationConfig
from rpg.labs.vision.detection_data import make_canvases
from rpg.seeding import permutation
from tokenization.errors import InputError

IGNORED = 255
"""The class of pixels that are ignored in training and in metrics."""

NUM_CLASSES = {"canvases": 11, "ade20k": 150, "voc": 21}

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the colours of ImageNet, by which images are standardised: weights that were trained on it fit."""

SMALLEST_CROP = 0.25
"""Least share of a training image's area that is cut out."""

Sample = tuple[Tensor, Tensor]
"""An image, float32 ``[3, S, S]``, and the classes of its pixels, uint8 ``[H, W]``."""


class Canvases(Dataset[Sample]):
    """Digits on canvases: the background is class 0, the digits are 1 … 10."""

    def __init__(self, split: str, config: SegmentationConfig) -> None:
        num = config.canvases if split == "train" else max(1, config.canvases // 4)
        # smaller canvases hold smaller digits
        sides = (config.image_size // 4, 7 * config.image_size // 16)
        made = make_canvases(split, num, config.image_size, config.seed, sides=sides)
        self.images = [standardised(each.image) for each in made]
        self.maps = [each.label_map().to(torch.uint8) for each in made]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return self.images[index], self.maps[index]


class MappedImages(Dataset[Sample]):
    """Pairs of an image and a PNG with the class of each pixel.

    Images are brought to S×S. In training they and their maps are cut out and mirrored at random; maps to score on have
    the size they have on the disk.
    """

    def __init__(self, samples: list[tuple[Path, Path]], config: SegmentationConfig, training: bool) -> None:
        self.samples, self.config, self.training = samples, config, training
        self.num_classes = NUM_CLASSES[config.dataset]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        """A sample. Raises OSError or ValueError where a file is broken, or holds no map of the data set's classes."""
        from torchvision import tv_tensors  # imported here: slow
        from torchvision.transforms import v2

        image = tv_tensors.Image(np.array(Image.open(self.samples[index][0]).convert("RGB")).transpose(2, 0, 1))
        classes = tv_tensors.Mask(self._classes(self.samples[index][1]))
        if classes.shape != image.shape[1:]:
            raise ValueError(f"its map is {tuple(classes.shape)} pixels large, the image {tuple(image.shape[1:])}")
        size = [self.config.image_size] * 2
        if self.training:
            cut = v2.RandomResizedCrop(size, (SMALLEST_CROP, 1.0), antialias=True)
            image, classes = v2.RandomHorizontalFlip()(*cut(image, classes))
        else:
            image = v2.functional.resize(image, size, antialias=True)
        return standardised(image.as_subclass(Tensor).float() / 255), classes.as_subclass(Tensor)

    def _classes(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as opened:
                if opened.mode not in ("L", "P"):
                    raise ValueError(f"its mode is {opened.mode}, not L or P")
                found = torch.from_numpy(np.array(opened))
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"its map {path.name}: {str(error).splitlines()[0]}") from None
        if self.config.dataset == "ade20k":
            found = torch.where(found == 0, IGNORED, found - 1)  # 0 is what belongs to no class
        wrong = found[(found >= self.num_classes) & (found != IGNORED)]
        if len(wrong):
            raise ValueError(f"its map {path.name} has a class {int(wrong.max())} of {self.num_classes}, from 0")
        return found


def standardised(image: Tensor) -> Tensor:
    """An image ``[3, S, S]`` of 0 … 1 with the mean and deviation of ImageNet's colours taken out."""
    return (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


def open_split(split: str, config: SegmentationConfig) -> Dataset[Sample]:
    """Images and maps of ``train``, ``validation`` or ``test``.

    Of folders ``test`` is what their own archives call validation, and ``validation`` a share of the training images.

    Raises:
        InputError: there is no such split, or the folder does not hold the data set.
    """
    if split not in ("train", "validation", "test"):
        raise InputError(f"there is no split {split!r}; choose one of train, validation, test")
    if config.dataset == "canvases":
        return Canvases(split, config)
    find = {"ade20k": _ade20k, "voc": _voc}[config.dataset]
    samples = find(Path(config.data), split != "test")
    for image, classes in samples:
        if not classes.is_file():
            raise InputError(f"{image} has no map {classes}; put it there, or take the image out")
    if split != "test":
        num = round(config.validation * len(samples))
        order = permutation(len(samples), config.seed, "validation").tolist()
        samples = [samples[place] for place in sorted(order[:num] if split == "validation" else order[num:])]
    if not samples:
        raise InputError(
            f"task.data {config.data} has no image for the split {split}; add images, or set task.validation"
        )
    return MappedImages(samples, config, split == "train")


def _ade20k(root: Path, training: bool) -> list[tuple[Path, Path]]:
    """Of ``ADEChallengeData2016``, or of the folder that holds it."""
    inner = root / "ADEChallengeData2016"
    root, part = inner if inner.is_dir() else root, "training" if training else "validation"
    images = sorted((root / "images" / part).glob("*.jpg"))
    if not images:
        raise InputError(f"{root / 'images' / part} holds no .jpg; task.data names the folder ADEChallengeData2016")
    return [(image, root / "annotations" / part / f"{image.stem}.png") for image in images]


def _voc(root: Path, training: bool) -> list[tuple[Path, Path]]:
    from torchvision import datasets  # imported here: slow

    try:
        opened: Any = datasets.VOCSegmentation(str(root), "2012", "train" if training else "val")
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"task.data {root} holds no VOCdevkit/VOC2012 ({str(error).splitlines()[0]}); name the folder that does"
        ) from None
    return [(Path(image), Path(classes)) for image, classes in zip(opened.images, opened.masks, strict=True)]

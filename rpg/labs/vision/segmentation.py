"""The task ``segmentation``: segmentation networks, whole or in part, scored by mean IoU.

Data sets: digits on canvases, ADE20K and Pascal VOC, the latter two in their archives' layouts.
B images, S height and width after resizing, C classes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from rpg.devices import use_threads
from rpg.labs.vision.config import SegmentationConfig
from rpg.labs.vision.detection_data import make_canvases
from rpg.packages import install_command
from rpg.seeding import permutation
from rpg.tasks.stepwise import DatasetTask
from tokenization.errors import InputError

IGNORED = 255
"""The class of pixels that are ignored in training and in metrics."""

NUM_CLASSES = {"canvases": 11, "ade20k": 150, "voc": 21}

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's colours, by which images are standardised, as pretrained weights expect."""

SMALLEST_CROP = 0.25
"""Smallest share of a training image's area in a random crop."""

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

    Images are resized to S×S. In training images and maps are cropped and mirrored at random; maps to score on keep
    their original size.
    """

    def __init__(self, samples: list[tuple[Path, Path]], config: SegmentationConfig, training: bool) -> None:
        self.samples, self.config, self.training = samples, config, training
        self.num_classes = NUM_CLASSES[config.dataset]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        """A sample. Raises OSError or ValueError if a file is broken, or is not a map of the data set's classes."""
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
            found = torch.where(found == 0, IGNORED, found - 1)  # 0 means no class
        wrong = found[(found >= self.num_classes) & (found != IGNORED)]
        if len(wrong):
            raise ValueError(f"its map {path.name} has a class {int(wrong.max())} of {self.num_classes}, from 0")
        return found


def standardised(image: Tensor) -> Tensor:
    """Standardise an image ``[3, S, S]`` in 0 … 1 by the mean and deviation of ImageNet's colours."""
    return (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


def open_split(split: str, config: SegmentationConfig) -> Dataset[Sample]:
    """Images and maps of ``train``, ``validation`` or ``test``. Raises InputError if the folder lacks them.

    For folders, ``test`` is the archive's validation set, and ``validation`` a share of the training images.
    """
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
    """Images and maps in ``ADEChallengeData2016``, or in the folder that contains it."""
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


SEGFORMERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "mini": ((1, 1, 1, 1), (16, 32, 64, 96), 64),
    "b0": ((2, 2, 2, 2), (32, 64, 160, 256), 256),
    "b1": ((2, 2, 2, 2), (64, 128, 320, 512), 256),
    "b2": ((3, 4, 6, 3), (64, 128, 320, 512), 768),
    "b3": ((3, 4, 18, 3), (64, 128, 320, 512), 768),
    "b4": ((3, 8, 27, 3), (64, 128, 320, 512), 768),
    "b5": ((3, 6, 40, 3), (64, 128, 320, 512), 768),
}
"""Depths and widths of the four stages, and the decoder's width (arXiv 2105.15203, table 6); ``mini`` is ours."""


class SmallSegmenter(nn.Module):
    """A U-Net (arXiv 1505.04597) with group norms: images ``[B, 3, S, S]`` → logits ``[B, classes, S / 2, S / 2]``.

    Args:
        widths: channels of its levels, each half as large as the last.
    """

    def __init__(self, num_classes: int, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.down = nn.ModuleList(
            _block(before, after) for before, after in zip((widths[0], *widths), widths, strict=False)
        )
        self.up = nn.ModuleList(
            _block(low + high, high) for high, low in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits at half resolution."""
        hidden, skipped = self.stem(images), []
        for number, block in enumerate(self.down):
            hidden = block(F.max_pool2d(hidden, 2) if number else hidden)
            skipped.append(hidden)
        for block, high in zip(self.up, skipped[-2::-1], strict=True):
            hidden = block(torch.cat([F.interpolate(hidden, high.shape[-2:]), high], 1))
        return self.head(hidden)


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False), nn.GroupNorm(4, after), nn.SiLU(),
        nn.Conv2d(after, after, 3, padding=1, bias=False), nn.GroupNorm(4, after), nn.SiLU(),
    )  # fmt: skip


def build_segmenter(name: str, num_classes: int) -> nn.Module:
    """A network by name, drawn from torch's global random state; `logits_of` runs it on ``[B, 3, S, S]``."""
    from torchvision import models  # imported here: slow

    if name == "unet-mini":
        return SmallSegmenter(num_classes)
    kind, _, size = name.partition("-")
    if kind == "segformer" and size in SEGFORMERS:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        depths, widths, decoder = SEGFORMERS[size]
        options: dict[str, Any] = {"depths": list(depths), "hidden_sizes": list(widths), "num_labels": num_classes}
        return SegformerForSemanticSegmentation(SegformerConfig(decoder_hidden_size=decoder, **options))
    known = models.list_models(module=models.segmentation)
    if name not in known:
        ours = ["unet-mini", *(f"segformer-{each}" for each in SEGFORMERS)]
        raise InputError(
            f"task.network {name!r} is not a segmentation network; choose one of {', '.join(ours + known)}"
        )
    return models.get_model(name, weights=None, weights_backbone=None, num_classes=num_classes)


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Logits ``[B, classes, s, s]`` of images ``[B, 3, S, S]`` at the network's output resolution, s ≤ S."""
    found: Any = network(images)
    if isinstance(found, Tensor):
        return found
    return found["logits"] if "logits" in found else found["out"]


Batch = tuple[Tensor, list[Tensor]]
"""Images ``[B, 3, S, S]`` and a map of classes ``[H, W]`` of each."""


class SegmentationTask(DatasetTask):
    """Collects zoos of segmentation networks and scores state dicts by mean IoU."""

    config: SegmentationConfig

    def __init__(self, config: SegmentationConfig) -> None:
        super().__init__(config)
        if importlib.util.find_spec("torchmetrics") is None:
            cure = f"run {install_command('torchmetrics')}"
            raise InputError(f"the task segmentation needs torchmetrics, which is not installed; {cure}")
        self.num_classes = NUM_CLASSES[config.dataset]

    def make_network(self) -> nn.Module:
        """The untrained target network. Raises InputError for an unknown name."""
        return build_segmenter(self.config.network, self.num_classes)

    def open_split(self, split: str) -> Dataset[Sample]:
        """Images and maps of a split. Raises InputError if the folder lacks them."""
        return open_split(split, self.config)

    def batch(self, samples: list[Sample]) -> Batch:
        """Images, and the map of each."""
        images, maps = zip(*samples, strict=True)
        return torch.stack(images).to(self.device), [each.to(self.device) for each in maps]

    def loss(self, network: nn.Module, batch: Batch, step: int) -> Tensor:
        """Mean cross entropy over the pixels that are not ignored."""
        images, maps = batch
        classes = torch.stack(maps).long()
        logits = F.interpolate(logits_of(network, images), classes.shape[-2:], mode="bilinear")
        total = F.cross_entropy(logits, classes, ignore_index=IGNORED, reduction="sum")
        return total / (classes != IGNORED).sum().clamp(min=1)

    @torch.inference_mode()
    def own_metrics(self, network: Mapping[str, Tensor], split: str = "test") -> dict[str, float]:
        """Mean IoU over the classes that occur in maps or predictions, and pixel accuracy.

        Both are over all pixels of the split, at the maps' own resolution. Raises InputError if the network does not
        fit, or an image cannot be read.
        """
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

        fitted = self.network_with(network).eval()
        options: dict[str, Any] = {"ignore_index": IGNORED, "validate_args": False}
        overlap = MulticlassJaccardIndex(self.num_classes, **options).to(self.device)
        right = MulticlassAccuracy(self.num_classes, average="micro", **options).to(self.device)
        with use_threads(self.config.threads):
            for images, maps in self.batches(split):
                logits = logits_of(fitted, images)
                for some, classes in _by_size(logits, maps):
                    answers = F.interpolate(some, classes.shape[-2:], mode="bilinear")
                    answers = answers.argmax(1).where(answers.isfinite().all(1), 0)  # not finite: class 0
                    overlap.update(answers, classes.long())
                    right.update(answers, classes.long())
        return {"miou": overlap.compute().item(), "pixel_accuracy": right.compute().item()}


def _by_size(logits: Tensor, maps: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and maps ``[b, H, W]``: batched if all maps have one size, else one by one."""
    if len({each.shape for each in maps}) == 1:
        yield logits, torch.stack(maps)
    else:
        yield from ((some[None], classes[None]) for some, classes in zip(logits, maps, strict=True))

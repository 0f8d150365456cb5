"""The task ``segmentation``: segmentation networks, whole or in part, scored by mean IoU.

B images, S height and width that images are brought to, C classes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from rpg.labs.vision.config import SegmentationConfig
from rpg.labs.vision.segmentation_data import IGNORED, NUM_CLASSES, open_split
from rpg.packages import install_command
from rpg.tasks.collecting import use_threads
from rpg.tasks.images.loading import batches_to_score, batches_to_train
from rpg.tasks.stepwise import FinetunedTask
from tokenization.errors import InputError

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
        num_classes: of the pixels.
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
    """A network by name, its weights from torch's global random state: ``[B, 3, S, S]`` → what `logits_of` takes.

    Raises:
        InputError: there is no such network.
    """
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
    """Logits ``[B, classes, s, s]`` of images ``[B, 3, S, S]`` at the resolution of the network's own, s at most S."""
    found: Any = network(images)
    if isinstance(found, Tensor):
        return found
    return found["logits"] if "logits" in found else found["out"]


def enlarge(logits: Tensor, size: torch.Size) -> Tensor:
    """Logits ``[B, classes, s, s]`` at the resolution of a map of classes, by bilinear interpolation."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


Batch = tuple[Tensor, list[Tensor]]
"""Images ``[B, 3, S, S]`` and a map of classes ``[H, W]`` of each."""


class SegmentationTask(FinetunedTask):
    """Collects zoos of segmentation networks and scores state dicts by mean IoU."""

    config: SegmentationConfig

    def __init__(self, config: SegmentationConfig) -> None:
        super().__init__(config)
        if importlib.util.find_spec("torchmetrics") is None:
            cure = f"run {install_command('torchmetrics')}"
            raise InputError(f"the task segmentation needs torchmetrics, which is not installed; {cure}")
        self.num_classes = NUM_CLASSES[config.dataset]
        self._opened: dict[str, Dataset[Any]] = {}

    def make_network(self) -> nn.Module:
        """The untrained target network. Raises InputError if there is none of that name."""
        return build_segmenter(self.config.network, self.num_classes)

    def dataset(self, split: str) -> Any:
        """Images and maps of a split. Raises InputError where the folder does not hold them."""
        if split not in self._opened:
            self._opened[split] = open_split(split, self.config)
        return self._opened[split]

    def batches(self, split: str) -> Iterator[Batch]:
        """Images and maps of a split, in their order. Raises InputError if a file cannot be read."""
        yield from map(self._stacked, batches_to_score(self.dataset(split), self.config))

    def batches_after(self, done: int) -> Iterator[Batch]:
        """The training batches of all epochs but the first ``done`` ones, without end.

        Each is full: a batch of one image is too few for a batch norm of global features.
        """
        yield from map(self._stacked, batches_to_train(self.dataset("train"), self.config, done))

    def _stacked(self, samples: list[Any]) -> Batch:
        images, maps = zip(*samples, strict=True)
        return torch.stack(images).to(self.device), [each.to(self.device) for each in maps]

    def loss(self, network: nn.Module, batch: Batch, step: int) -> Tensor:
        """Mean cross entropy of the pixels that count."""
        images, maps = batch
        classes = torch.stack(maps).long()
        logits = enlarge(logits_of(network, images), classes.shape[-2:])
        total = F.cross_entropy(logits, classes, ignore_index=IGNORED, reduction="sum")
        return total / (classes != IGNORED).sum().clamp(min=1)

    @torch.inference_mode()
    def own_metrics(self, network: Mapping[str, Tensor], split: str = "test") -> dict[str, float]:
        """Mean intersection over union of the classes that are there or answered, and the share of right pixels.

        Both over all pixels of the split, at the maps' own resolution.

        Raises:
            InputError: the network does not fit, or an image cannot be read.
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
                    answers = enlarge(some, classes.shape[-2:])
                    answers = answers.argmax(1).where(answers.isfinite().all(1), 0)  # broken ones decide nothing
                    overlap.update(answers, classes.long())
                    right.update(answers, classes.long())
        return {"miou": overlap.compute().item(), "pixel_accuracy": right.compute().item()}


def _by_size(logits: Tensor, maps: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and maps ``[b, H, W]`` together where all maps are of one size, else one by one."""
    if len({each.shape for each in maps}) == 1:
        yield logits, torch.stack(maps)
    else:
        yield from ((some[None], classes[None]) for some, classes in zip(logits, maps, strict=True))

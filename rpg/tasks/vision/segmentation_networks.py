"""Networks that tell the class of each pixel: torchvision's, transformers' SegFormer, and a small one for two cores.

B images, S height and width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        raise InputError(f"task.network {name!r} is no segmentation network; choose one of {', '.join(ours + known)}")
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

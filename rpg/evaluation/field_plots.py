"""Pictures of generated fields."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tokenization.files import atomic_file

GAP, PAPER = 1, 0.6
"""Pixels between images, and their shade."""


def save_image(image: Tensor, path: Path | str, scale: int = 1) -> None:
    """Write ``[C, H, W]`` in 0 … 1, grey or RGB, as a PNG; every pixel becomes ``scale``² of them."""
    values = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    values = values.repeat_interleave(scale, 1).repeat_interleave(scale, 2).permute(1, 2, 0)
    with atomic_file(path) as temporary:
        Image.fromarray(values.squeeze(-1).numpy()).save(temporary, format="PNG")


def grid(images: Tensor, columns: int) -> Tensor:
    """Images ``[M, C, S, S]`` row by row in one ``[C, H, W]``, ink dark on light where they are grey."""
    num, channels, size = images.shape[:3]
    shown = 1 - images if channels == 1 else images
    rows, cell = -(-num // columns), size + GAP
    sheet = torch.full((channels, rows * cell + GAP, columns * cell + GAP), PAPER)
    for place, image in enumerate(shown):
        top, left = place // columns * cell + GAP, place % columns * cell + GAP
        sheet[:, top : top + size, left : left + size] = image
    return sheet


def beside(sheets: Sequence[Tensor], gap: int) -> Tensor:
    """Sheets of one height side by side."""
    channels, height = sheets[0].shape[:2]
    parts = [part for sheet in sheets for part in (torch.ones(channels, height, gap), sheet)][1:]
    return torch.cat(parts, 2)

"""Images that networks draw: as pictures, and measured against held-out images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from rpg.evaluation.field_measures import letter_features, measure_samples, shown_by
from rpg.evaluation.two_sample import evenly
from rpg.tasks.base import SampleTask
from tokenization.errors import InputError
from tokenization.files import atomic_file

LINE, PAPER = 1, 0.6
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
    rows, cell = -(-num // columns), size + LINE
    sheet = torch.full((channels, rows * cell + LINE, columns * cell + LINE), PAPER)
    for place, image in enumerate(shown):
        top, left = place // columns * cell + LINE, place % columns * cell + LINE
        sheet[:, top : top + size, left : left + size] = image
    return sheet


def beside(sheets: Sequence[Tensor], gap: int) -> Tensor:
    """Sheets of one height side by side."""
    channels, height = sheets[0].shape[:2]
    parts = [part for sheet in sheets for part in (torch.ones(channels, height, gap), sheet)][1:]
    return torch.cat(parts, 2)


ROWS, COLUMNS, GAP, SCALE = 6, 8, 4, 4
"""Of a picture of samples: images of a network, pixels between two networks, and pixels a pixel is enlarged to."""


def sample_metrics(task: SampleTask, network: Mapping[str, Tensor], split: str) -> dict[str, float]:
    """Metrics by name: ``one_nna`` first, 0.5 where samples cannot be told from as many held-out images.

    Args:
        task: draws, and has the images.
        network: the one that draws.
        split: whose images it is held against; ``train`` is what it learned from.

    Raises:
        InputError: the network does not fit, or the split has fewer images than the task draws.
    """
    drawn, held_out, training = task.samples(network), task.images(split), task.images("train")
    if len(held_out) < len(drawn):
        raise InputError(f"split {split} has {len(held_out)} images, fewer than task.samples {len(drawn)}; lower that")
    features = letter_features(drawn.shape[-1], drawn.shape[1])
    own, others, known = (shown_by(each) for each in (drawn, evenly(held_out, len(drawn)), training))
    return measure_samples([own], others, known, features)


def draw_samples(task: SampleTask, networks: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """What networks draw from the same noise, side by side: ``[C, H, W]``. Raises InputError if one does not fit."""
    return beside([grid(task.samples(each, ROWS * COLUMNS), COLUMNS) for each in networks], GAP)

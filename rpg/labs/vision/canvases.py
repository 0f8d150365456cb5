"""Digits placed on canvases: small real data for detection and segmentation, whose boxes and masks are known exactly.

S height and width of a canvas, K digits on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rpg.seeding import make_rng
from rpg.tasks.images.digits import load_splits

NUM_CLASSES = 10
INK = 0.35  # of the brightest: a pixel with more belongs to the digit
TRIES = 20  # places that are tried for a digit before it is left out


@dataclass(frozen=True)
class Canvas:
    """One image and what is on it.

    Attributes:
        image: float32 ``[3, S, S]`` in 0 … 1.
        boxes: float32 ``[K, 4]`` in pixels: left, top, right, bottom, the last two excluded. K is 1 or more.
        labels: the digits, int64 ``[K]`` in 0 … 9; count from 1 where 0 is the background.
        masks: bool ``[K, S, S]``; no two of them overlap, and ``boxes`` are their bounds.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor

    def label_map(self) -> Tensor:
        """The class of each pixel, int64 ``[S, S]``: 0 is the background, 1 … 10 are the digits 0 … 9."""
        return (self.masks * (self.labels + 1)[:, None, None]).sum(0)


def make_canvases(
    split: str, num: int, size: int = 64, seed: int = 0, *, most: int = 3, sides: tuple[int, int] = (16, 28)
) -> list[Canvas]:
    """Canvases with 1 to ``most`` digits of one split, coloured, on a coloured and noisy ground.

    Args:
        split: whose digits are placed: train, validation or test. No digit is in two splits.
        num: canvases. Each has random numbers of its own, so that fewer are the first of more.
        size: S.
        seed: decides everything, together with the split.
        most: digits on a canvas at most; one that finds no free place is left out, never the first.
        sides: smallest and largest height, and so width, of a digit's square, at most S.

    Raises:
        InputError: there is no such split.
    """
    splits = load_splits()
    images, labels = splits.images[splits.check(split)][:, 0], splits.labels[split]
    ink = (images - images.min()) / (images.max() - images.min())  # [n, 8, 8] in 0 … 1
    return [_draw(ink, labels, size, most, sides, make_rng(seed, "canvas", split, index)) for index in range(num)]


def _draw(ink: Tensor, labels: Tensor, size: int, most: int, sides: tuple[int, int], rng: torch.Generator) -> Canvas:
    def whole(low: int, high: int) -> int:  # both included
        return int(torch.randint(low, high + 1, (), generator=rng))

    coarse = torch.rand(1, 3, 3, 3, generator=rng) * 0.35
    image = F.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)[0]
    image = image + torch.randn(3, size, size, generator=rng) * 0.03
    taken = torch.zeros(size, size, dtype=torch.bool)
    boxes, masks, digits = [], [], []
    for _ in range(whole(1, most)):
        row, side = whole(0, len(ink) - 1), whole(*sides)
        colour = 0.5 + torch.rand(3, 1, 1, generator=rng) * 0.5
        digit = F.interpolate(ink[None, None, row], (side, side), mode="bicubic", align_corners=False)[0, 0].clamp(0, 1)
        for _ in range(TRIES):
            top, left = whole(0, size - side), whole(0, size - side)
            place = (slice(top, top + side), slice(left, left + side))
            if not taken[place].any():
                break
        else:
            continue
        taken[place] = True
        square = image[:, place[0], place[1]]
        square += (colour - square) * digit
        mask = torch.zeros(size, size, dtype=torch.bool)
        mask[place] = digit > INK
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        masks.append(mask)
        digits.append(int(labels[row]))
    return Canvas(image.clamp(0, 1), torch.tensor(boxes).float(), torch.tensor(digits), torch.stack(masks))

"""Judges of what fields show: a classifier of the asked class, and features of one that saw other data."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from rpg.evaluation.field_measures import Features
from rpg.seeding import make_rng

SYMBOLS = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZabdefghijkmnpqrt"
DRAWN, STEPS, BATCH = 28, 600, 128
"""Side of the drawn letters; training steps of the classifier of letters, and its batch."""

MANY_VALUES, COMPONENTS = 512, 64
"""From how many values on the judge of classes takes principal components, and how many."""


def class_judge(data: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """A support-vector machine of data ``[n, F]`` and classes ``[n]``: other data ``[M, F]`` → classes ``[M]``.

    Of data of many values it takes the leading principal components.
    """
    # imported here: slow, and only needed by this experiment
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import SVC

    many = [PCA(COMPONENTS, random_state=0)] if data.shape[1] > MANY_VALUES and len(data) > COMPONENTS else []
    machine = make_pipeline(*many, SVC(C=10.0)).fit(data.numpy(), labels.numpy())
    return lambda others: torch.from_numpy(machine.predict(others.numpy()))


class _Classifier(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.third = nn.Linear(64 * (-(-size // 2)) ** 2, 64)
        self.last = nn.Linear(64, len(SYMBOLS))

    def features(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.second(F.relu(self.first(images))))
        return F.relu(self.third(F.max_pool2d(hidden, 2, ceil_mode=True).flatten(1)))


@cache
def letter_features(size: int, channels: int) -> Features:
    """Features ``[M, 64]`` of a classifier of printed letters and digits, for images ``[M, C · size²]`` in 0 … 1.

    It saw drawings of matplotlib's fonts, turned and moved, and no image of any data set: features of a classifier
    that saw the training data rate copies of those too well, or too badly.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _Classifier(size)
    drawings, labels = _drawings()
    rng = make_rng(0, "letters")
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, fused=True)
    for _ in range(STEPS):
        rows = torch.randint(len(drawings), (BATCH,), generator=rng)
        images = F.interpolate(_turned(drawings[rows], rng), size=size, mode="area")
        loss = F.cross_entropy(network.last(network.features(images)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return network.features(images.view(len(images), channels, size, size).mean(1, keepdim=True))

    return features


def _drawings() -> tuple[Tensor, Tensor]:
    """Every symbol in every font of matplotlib's, filling the frame: ``[n, 1, S, S]`` in 0 … 1, and which symbol."""
    import matplotlib  # imported here: slow, and only needed by this experiment

    fonts = sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("DejaVuS*.ttf"))
    images, labels = [], []
    for font in fonts:
        if "Display" in font.name:  # has formulas' symbols alone
            continue
        letters = ImageFont.truetype(str(font), 40)
        for number, symbol in enumerate(SYMBOLS):
            left, top, right, bottom = letters.getbbox(symbol)
            drawn = Image.new("L", (int(right - left), int(bottom - top)))
            ImageDraw.Draw(drawn).text((-left, -top), symbol, font=letters, fill=255)
            values = torch.frombuffer(bytearray(drawn.resize((DRAWN, DRAWN)).tobytes()), dtype=torch.uint8)
            images.append(values.view(1, DRAWN, DRAWN).float() / 255)
            labels.append(number)
    return torch.stack(images), torch.tensor(labels)


def _turned(images: Tensor, rng: torch.Generator) -> Tensor:
    matrix = torch.eye(2, 3).expand(len(images), 2, 3) + 0.15 * torch.randn(len(images), 2, 3, generator=rng)
    return F.grid_sample(images, F.affine_grid(matrix, list(images.shape), align_corners=False), align_corners=False)

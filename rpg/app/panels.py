"""Panels to try networks in: a sensor with adjustable settings, and a digit drawn by the user.

Digits are preprocessed like scikit-learn's. Those came from forms whose digits were cut out, scaled to 32×32
black-and-white pixels and counted in blocks of 4×4 (Alpaydin and Kaynak, "Optical recognition of handwritten digits",
UCI repository, 1998): 8×8 numbers from 0 to 16. T networks, B images, K classes.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rpg.app.loaded import LoadedRun, PageResult
from rpg.labs.fields.task import FieldsTask
from rpg.labs.training_runs.task import TrainingRunsTask
from rpg.models.conditioning import example_rows
from rpg.seeding import make_rng
from rpg.tasks.images.digits import DIGITS_SIZE, DigitsSubsetsTask, DigitsTask, standardise
from rpg.tasks.images.networks import logits_of
from rpg.tasks.sensors.simulator import seen_by
from rpg.tasks.sensors.task import SensorsTask
from rpg.tasks.side_by_side import stack
from tokenization.checkpoint.checkpoint import StateDict
from tokenization.errors import InputError
from tokenization.zoo.condition import Setting

SHOWN = 10
"""Number of pictures shown: the first of each class."""


@dataclass(frozen=True)
class Panel:
    """Contents of the sensor panel.

    Attributes:
        pictures: the sensor's view, ``[SHOWN, C, S, S]`` in 0 … 1.
        accuracies: of the generated networks together and of the fixed network, by label.
        votes, answers: networks per predicted class, ``[SHOWN, K]``, and the ensemble's class ``[SHOWN]``.
    """

    pictures: Tensor
    accuracies: dict[str, float]
    votes: Tensor
    answers: Tensor
    num: int
    classes: tuple[str, ...]


def sensors_task(run: LoadedRun) -> SensorsTask | None:
    """The run's task if it is about sensors, else None."""
    return run.task if isinstance(run.task, SensorsTask) else None


def settings_of(run: LoadedRun) -> tuple[Setting, ...]:
    """The sensor's adjustable settings."""
    task = sensors_task(run)
    return task.settings if task is not None else ()


def condition_for(run: LoadedRun, values: list[float], words: str = "", num: int = 1) -> Any:
    """The condition for a sensor: its settings, its description, or ``num`` unlabelled examples from it."""
    task, spec = sensors_task(run), run.condition
    if task is None or spec is None:
        raise InputError("this generator is not one of sensors; name another run")
    if spec.kind == "text":
        return words
    if spec.settings:
        return values
    rng, settings = make_rng(0, "page"), torch.tensor([values])
    num_classes, shown = len(task.class_names), []
    for _ in range(num):  # one by one, so that the first of three pictures is the one that was shown alone
        which = torch.randint(num_classes, (1, 1), generator=rng)
        shown.append(task.examples(settings, which, rng, "validation")[0])
    return example_rows(torch.cat(shown), None, num_classes)


def look(run: LoadedRun, values: list[float], made: PageResult | None) -> Panel:
    """The view of a sensor and the networks' predictions for it.

    A generator conditioned on settings generates a network for them immediately; for others ``made`` is shown.
    """
    task = sensors_task(run)
    assert task is not None and run.condition is not None
    networks = [] if made is None else made.networks
    if run.condition.settings:
        networks = run.generator.generate(1, condition=values)  # type: ignore[assignment]
    settings, split = torch.tensor([values]), run.config.evaluate.split
    images, known = task.images(split), task.classes(split)
    first = torch.stack([(known == each).nonzero()[0, 0] for each in range(len(task.class_names))])[:SHOWN]
    seen = task.see(images, settings)  # [1, B, C, S, S]
    with torch.inference_mode():
        accuracies, shares = {}, None
        if networks:
            shares = task.side(stack(networks), seen[0]).softmax(-1)  # [T, B, K]
            name = "made for it" if len(networks) == 1 else f"{len(networks)} networks together"
            accuracies[name] = (shares.mean(0).argmax(-1) == known).double().mean().item()
        if (fixed := run.fixed_network) is not None:
            answers = task.side(stack([fixed]), seen[0]).argmax(-1)[0]
            accuracies["one fixed network, for an upright sensor"] = (answers == known).double().mean().item()
    num_classes = len(task.class_names)
    votes, said = torch.zeros(len(first), num_classes), torch.full((len(first),), -1)
    if shares is not None:
        each = shares[:, first].argmax(-1)  # [T, SHOWN]
        votes = torch.nn.functional.one_hot(each, num_classes).sum(0).float()
        said = shares[:, first].mean(0).argmax(-1)
    pictures = seen_by(images[first], task.settings, settings)[0]
    return Panel(pictures, accuracies, votes, said, len(networks), tuple(task.class_names))


FINE, BLOCK = 32, 4
MOST_PIXELS, MOST_CHARACTERS = 1 << 24, 1 << 20
PREFIX = "data:image/png;base64,"


@dataclass(frozen=True)
class Answer:
    """A network's prediction for a digit: the class in words, and its probability, 0 … 1."""

    text: str
    share: float


def reads_digits(run: LoadedRun) -> bool:
    """Whether the networks classify digits, so that the user can draw one."""
    return isinstance(run.task, DigitsTask | DigitsSubsetsTask | TrainingRunsTask)


def reads_examples(run: LoadedRun) -> bool:
    """Whether images of digits can set the condition."""
    return isinstance(run.task, DigitsSubsetsTask) or (
        isinstance(run.task, FieldsTask) and run.task.config.data == "digits"
    )


def drawn(url: Any) -> Tensor:
    """The digit on a canvas, from its data URL: counts ``[8, 8]``. Raises InputError if there is none."""
    if not isinstance(url, str) or not url.startswith(PREFIX) or len(url) > MOST_CHARACTERS:
        raise InputError("what was drawn did not arrive as a picture; draw it again")
    try:
        data = base64.b64decode(url[len(PREFIX) :], validate=True)
    except binascii.Error:
        raise InputError("what was drawn did not arrive as a picture; draw it again") from None
    return counted(_grey(io.BytesIO(data), "the drawing"), "the drawing")


def read_image(file: Path) -> Tensor:
    """The digit of an image file, dark on light or the reverse: counts ``[8, 8]``. Raises InputError if it has none."""
    return counted(_grey(file, file.name), file.name)


def _grey(source: Any, name: str) -> Tensor:
    """An image as ink 0 … 1, ``[H, W]``: the rarer of dark and light."""
    try:
        with Image.open(source, formats=("PNG", "JPEG", "BMP", "WEBP")) as image:
            if image.width * image.height > MOST_PIXELS:
                raise InputError(f"{name} has {image.width} × {image.height} pixels; give a smaller picture")
            paper = Image.new("RGBA", image.size, "white")
            paper.alpha_composite(image.convert("RGBA"))
            grey = torch.from_numpy(np.asarray(paper.convert("L"), dtype=np.float32) / 255)
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow's errors for broken files
        raise InputError(f"{name} is not a picture that can be read; give a PNG or JPEG file of one digit") from None
    border = torch.cat([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    return 1 - grey if border.median() > 0.5 else grey


def counted(ink: Tensor, name: str) -> Tensor:
    """Preprocess ink ``[H, W]`` in 0 … 1 like scikit-learn's digits: crop, 32×32 pixels, counts ``[8, 8]``."""
    dark = ink > 0.5
    if not dark.any():
        raise InputError(f"{name} shows no digit; draw one large and dark")
    rows, columns = dark.any(1).nonzero()[:, 0], dark.any(0).nonzero()[:, 0]
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    high, wide = cut.shape
    scale = FINE / max(high, wide)
    size = [max(1, round(high * scale)), max(1, round(wide * scale))]
    small = F.interpolate(cut[None, None], size=size, mode="bilinear", antialias=True, align_corners=False)[0, 0]
    top, left = (FINE - size[0]) // 2, (FINE - size[1]) // 2
    page = torch.zeros(FINE, FINE)
    page[top : top + size[0], left : left + size[1]] = small
    return F.avg_pool2d((page > 0.5).float()[None], BLOCK)[0] * BLOCK**2


def answer(run: LoadedRun, network: StateDict, counts: Tensor, condition: Sequence[float] | None) -> Answer:
    """A network's prediction for a digit ``[8, 8]``: a class, or whether it belongs to the classes of its condition."""
    task: Any = run.task
    size = getattr(task.config, "image_size", DIGITS_SIZE)
    with torch.random.fork_rng(devices=[]):
        built = task.build().cpu()
    shares = logits_of(built, network, standardise(counts[None, None], size), "a network")[0].softmax(0)
    share, place = (each.item() for each in shares.max(0))
    if not isinstance(task, DigitsSubsetsTask):
        return Answer(str(int(place)), share)
    return Answer("yes" if place else "no", share)


def answers(run: LoadedRun, made: PageResult, counts: Tensor) -> list[tuple[Answer, Answer | None, str]]:
    """The predictions of each generated network and of its nearest original, and the original's name."""
    found = []
    for index, network in enumerate(made.networks):
        beside, name = None, ""
        if run.originals is not None and made.nearest:
            place, name = made.nearest[index][0].index, made.nearest[index][0].name
            entry = run.originals.zoo.entries[place]
            beside = answer(run, run.originals.state_dict(place), counts, entry.condition)
        found.append((answer(run, network, counts, made.request.condition), beside, name))
    return found


def classes_of(run: LoadedRun, files: Sequence[Path]) -> list[int]:
    """The digits on images, by a family's base network, or for fields by the most similar digit in the zoo.

    Raises:
        InputError: a file is not an image of a digit, or the zoo has no base network.
    """
    if not files:
        raise InputError("there is no example; give one picture of a digit at least")
    if run.zoo is None:
        raise InputError("examples are understood by the zoo that was learned from, which is not here")
    counts = torch.stack([read_image(file) for file in files])[:, None]
    if isinstance(run.task, DigitsSubsetsTask):
        with torch.no_grad():
            return run.task.teacher(run.zoo)(standardise(counts, run.task.config.image_size)).argmax(-1).tolist()
    assert isinstance(run.task, FieldsTask)
    data = run.task.data
    return data.labels[torch.cdist(counts.flatten(1) / BLOCK**2, data.values.flatten(1)).argmin(1)].tolist()

"""The sensor panel: a sensor with adjustable settings, its view, and generated networks beside a fixed one.

T networks, B images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rpg.app.loaded import LoadedRun, PageResult
from rpg.models.conditioning import example_rows
from rpg.seeding import make_rng
from rpg.tasks.sensors.sensors import SensorsTask
from rpg.tasks.sensors.simulator import seen_by
from rpg.tasks.side_by_side import stack
from tokenization.checkpoint.structure import StateDict
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
        num: number of networks.
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
    # One by one, so that the first of three pictures is the one that was shown alone.
    pictures = [
        task.examples(settings, torch.randint(len(task.class_names), (1, 1), generator=rng), rng, "validation")[0]
        for _ in range(num)
    ]
    shown = torch.cat(pictures)
    return example_rows(shown, None, len(task.class_names))


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
        if (fixed := fixed_network(run)) is not None:
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


def fixed_network(run: LoadedRun) -> StateDict | None:
    """The network for an upright sensor, generated once, for generators conditioned on settings or words."""
    spec, kept = run.condition, getattr(run, "_fixed", None)
    if kept is None and spec is not None and spec.kind != "examples":
        asked = "upright" if spec.kind == "text" else [each.default for each in spec.settings]
        kept = run.generator.generate(1, condition=asked)[0]
        run._fixed = kept  # type: ignore[attr-defined]
    return kept

"""The control of generators that saw images: baselines that are trained on the same images for as long.

A loss on what networks answer (``train.new_states``, ``train.behaviour``) gives the generator data that no trivial
baseline has. Beside it belongs what anybody can do with that data: take a baseline and train it for the steps that the
generator spent, shared out over the networks that were asked for. T networks, B images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rpg.evaluation.config import ControlConfig
from rpg.evaluation.report import AT_DISTANCE, TRAINED_FROM
from rpg.seeding import make_rng
from rpg.tasks.base import ImageClassifier, Task
from rpg.tasks.collecting import warm_cosine
from rpg.tasks.side_by_side import SideBySide, stack, unstack
from tokenization.checkpoint.structure import StateDict
from tokenization.errors import InputError

START_NAMES = tuple(name + AT_DISTANCE for name in ("noise", "coordinate_gaussian", "run_coordinate_gaussian"))
"""The baselines that are trained: the best places to start from, of each kind."""


def finetuned_baselines(
    task: Task, sets: Mapping[str, Sequence[StateDict]], config: ControlConfig, seed: int
) -> dict[str, list[dict[str, Tensor]]]:
    """Every set of networks trained for each number of steps, by the name ``<steps>_steps_from_<set>``.

    Raises:
        InputError: the task has no images.
    """
    return {
        f"{steps}{TRAINED_FROM}{name}": finetune(task, networks, steps, config, make_rng(seed, "control", name, steps))
        for name, networks in sets.items()
        for steps in config.steps
    }


def finetune(
    task: Task, networks: Sequence[StateDict], steps: int, config: ControlConfig, rng: torch.Generator
) -> list[dict[str, Tensor]]:
    """Networks after ``steps`` of AdamW on the task's training images; none shares memory with those given.

    Batch norms keep their running statistics.

    Args:
        task: their structure, images and labels.
        networks: where they start.
        steps: 0 or more.
        config: learning rate and images a step.
        rng: draws the images, on the CPU; all networks see the same ones.

    Raises:
        InputError: the task has no images.
    """
    if not isinstance(task, ImageClassifier):
        raise InputError(
            f"evaluate.control trains on images, which {type(task).__name__} lacks; leave it out, or choose a task "
            "with images"
        )
    network = task.build()
    side, images, labels = SideBySide(network), task.images("train"), task.labels("train")
    trained = dict(network.named_parameters())
    weights = {name: value.requires_grad_(name in trained) for name, value in stack(networks).items()}
    rate = config.learning_rate
    optimizer = torch.optim.AdamW([weights[name] for name in trained], lr=rate, weight_decay=0.0, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * warm_cosine(step, steps)
        rows = torch.randint(len(labels), (config.batch_size,), generator=rng)
        logits = side(weights, images[rows])  # [T, B, classes]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[rows].repeat(len(networks)))
        optimizer.zero_grad()
        (loss * len(networks)).backward()  # so that a network's gradient does not depend on how many there are
        optimizer.step()
    return unstack({name: value.detach() for name, value in weights.items()})

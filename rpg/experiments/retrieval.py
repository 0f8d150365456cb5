"""Retrieval: a posterior over known tasks, by the likelihood of the shown images, without any training.

The likelihood is a kernel density of each task's images. T requests, n images of each, S known tasks, P values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rpg.seeding import make_rng
from rpg.tasks.side_by_side import Stacked

WIDTHS = (0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
"""Of the kernel, to choose from on validation tasks."""

CHUNK = 25
"""Known tasks whose images are compared at once."""


def log_likelihoods(task: Any, known: Tensor, shown: Tensor, widths: tuple[float, ...] = WIDTHS) -> Tensor:
    """Log-density of the requests' images among each known task's, up to a constant of each width: ``[W, T, S]``.

    Args:
        task: shows its training images, a :class:`rpg.tasks.sensors.sensors.SensorsTask`.
        known: tasks ``[S, C]``.
        shown: images ``[T, n, P]`` in 0 … 1.
        widths: W widths of the kernel.
    """
    images, queries = task.images("train"), task.inputs(shown).flatten(2).flatten(0, 1)  # [T · n, P]
    found = []
    for part in known.split(CHUNK):
        seen = task.see(images, part).flatten(2).flatten(0, 1)  # [CHUNK · images, P]
        distance = torch.cdist(queries, seen).square()
        distance = distance.view(len(queries), len(part), -1)
        logs = [(-distance / (2 * width**2)).logsumexp(-1) - math.log(distance.shape[-1]) for width in widths]
        found.append(torch.stack(logs))
    return torch.cat(found, -1).view(len(widths), *shown.shape[:2], len(known)).sum(2)


def drawn(log_likelihood: Tensor, networks: Stacked, num: int, seed: int) -> Stacked:
    """``num`` networks of known tasks for every request, by their posterior under equal odds, ``[T · num, *shape]``.

    Args:
        log_likelihood: ``[T, S]``.
        networks: of the known tasks, stacked.
        num: of a request.
        seed: of the draws.
    """
    rows = torch.multinomial(log_likelihood.softmax(-1), num, replacement=True, generator=make_rng(seed, "retrieved"))
    return {name: value[rows.flatten()] for name, value in networks.items()}

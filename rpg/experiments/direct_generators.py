"""Baselines that answer examples without diffusion: direct generators, and retrieval of known tasks' networks.

The single network is trained on its answers' cross-entropy; the implicit generator on the joint score of several draws
(`rpg.evaluation.two_sample.joint_score`), the very measure that draws are compared by. Retrieval has a posterior over
known tasks without any training: the likelihood of shown images is a kernel density of each task's images.

T tasks, M draws, n examples, V values of a network, N noise values, S known tasks, P values of an image."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rpg.evaluation.two_sample import joint_score
from rpg.models.conditioning import SetEncoder
from rpg.seeding import make_rng
from rpg.tasks.collecting import single_threaded
from rpg.tasks.side_by_side import Stacked
from rpg.training.examples import ExampleConditions
from tokenization.layouts import Layout

WIDTH, NUM_TASKS, NUM_IMAGES, LEARNING_RATE = 256, 32, 32, 2e-3
"""Of the networks and of their training: tasks and images of a step, peak of AdamW's one-cycle schedule."""


class DirectGenerator(nn.Module):
    """Examples and noise to a network's tokens.

    Args:
        noise: N; 0 makes one network of a set.
    """

    def __init__(self, size: int, num_classes: int, layout: Layout, noise: int = 0) -> None:
        super().__init__()
        self.layout, self.noise = layout, noise
        self.encoder = SetEncoder(size, num_classes, WIDTH)
        values = layout.num_tokens * layout.token_size
        self.network = nn.Sequential(
            nn.SiLU(), nn.Linear(WIDTH + noise, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(),
            nn.Linear(WIDTH, values),
        )  # fmt: skip

    def forward(self, sets: Tensor, num: int, rng: torch.Generator) -> Stacked:
        """``num`` networks of every set ``[T, n · size]``, stacked set by set ``[T · num, *shape]``."""
        encoded = self.encoder(sets).repeat_interleave(num, 0)
        noise = torch.randn(len(encoded), self.noise, generator=rng)
        tokens = self.network(torch.cat([encoded, noise], 1))
        return self.layout.decode_batch(tokens.view(-1, self.layout.num_tokens, self.layout.token_size), constants=True)


@single_threaded()
def train_direct(
    task: Any,
    examples: ExampleConditions,
    layout: Layout,
    steps: int,
    *,
    draws: int = 1,
    noise: int = 0,
    seed: int = 0,
    known: Tensor | None = None,
) -> DirectGenerator:
    """Train one by the joint score of its draws; of a single draw that is the cross-entropy.

    Args:
        task: shows and runs networks, a :class:`rpg.tasks.sensors.sensors.SensorsTask`.
        draws: M.
        noise: N.
        known: the tasks ``[K, C]`` to draw from; None: fresh ones in every step.
    """
    rng = make_rng(seed, "direct", draws)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DirectGenerator(examples.spec.size, examples.config.classes, layout, noise)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        if known is None:
            tasks = task.draw_tasks(NUM_TASKS, rng)
        else:
            tasks = known[torch.randint(len(known), (NUM_TASKS,), generator=rng)]
        networks = model(examples.draw(tasks, rng), draws, rng)
        images, classes = task.draw_for_each(NUM_TASKS, NUM_IMAGES, rng)
        seen = task.see(images, tasks).repeat_interleave(draws, 0)  # [T · M, B, C, S, S]
        answers = task.side(networks, seen).log_softmax(-1)
        chosen = classes.repeat_interleave(draws, 0)[..., None]
        right = answers.gather(-1, chosen).view(NUM_TASKS, draws, -1)  # [T, M, B]
        optimizer.zero_grad()
        joint_score(right).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


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
    """
    rows = torch.multinomial(log_likelihood.softmax(-1), num, replacement=True, generator=make_rng(seed, "retrieved"))
    return {name: value[rows.flatten()] for name, value in networks.items()}

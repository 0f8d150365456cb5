"""Fine-tuning one shared base network for many binary tasks side by side.

All tasks start from the same weights and see the same images in the same order, so that what differs between their
networks is what their tasks differ in. T tasks, C classes, B images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpg.devices import in_bf16
from rpg.tasks.collecting import warm_cosine
from rpg.tasks.images.config import FinetuneConfig, Stage
from rpg.tasks.side_by_side import SideBySide, Stacked, repeat

Draw = Callable[[int], tuple[Tensor, Tensor]]
"""Draws B training images ``[B, …]`` and their classes ``[B]``."""


def finetune_many(
    side: SideBySide,
    start: Stacked,
    bits: Tensor,
    draw: Draw,
    config: FinetuneConfig,
    tick: Callable[[int], None] = lambda done: None,
) -> list[Stacked]:
    """Fine-tune T networks; returns ``config.checkpoints`` of each, in the order of their steps.

    Args:
        side: the networks' structure.
        start: their weights to start from, ``[T, *shape]``.
        bits: their tasks, ``[T, C]``.
        draw: draws training images.
        config: the recipe.
        tick: called after every step with the number done.
    """
    weights = {name: value.clone().requires_grad_() for name, value in start.items()}
    stretches = checkpoint_stretches(config.stages[-1].steps, config.tail, config.checkpoints)
    kept: list[Stacked] = []
    done = 0
    for number, stage in enumerate(config.stages):
        trained = [value for name, value in weights.items() if any(fnmatchcase(name, each) for each in stage.only)]
        optimizer = torch.optim.AdamW(
            trained, lr=stage.learning_rate, weight_decay=stage.weight_decay, betas=(0.9, 0.99), fused=True
        )
        for value in weights.values():
            value.requires_grad_(any(value is each for each in trained))
        last = number == len(config.stages) - 1
        for step in range(stage.steps):
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * learning_rate_share(step, stage)
            images, classes = draw(config.batch_size)
            optimizer.zero_grad()
            _add_gradients(side, weights, images, bits[:, classes], config)
            optimizer.step()
            if last and step + 1 > stretches[0][0]:
                average_into(kept, stretches, step + 1, weights)
            done += 1
            tick(done)
    return kept


def _add_gradients(side: SideBySide, weights: Stacked, images: Tensor, targets: Tensor, config: FinetuneConfig) -> None:
    """Add the gradients of T networks' losses: some images, and of large networks one, at a time.

    Args:
        side, weights, config: as `finetune_many` takes them.
        images: ``[B, …]``.
        targets: right answers ``[T, B]``.
    """
    size = config.images_at_a_time or len(images)
    several = [weights]
    if side.is_large:  # one network's activations are held, not those of all
        several = [{name: value[row : row + 1] for name, value in weights.items()} for row in range(len(targets))]
    for own, answers in zip(several, targets.chunk(len(several)), strict=True):
        for part, wanted in zip(images.split(size), answers.split(size, 1), strict=True):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=in_bf16(config.precision, images.device)):
                logits = side(own, part)
            loss = task_losses(logits, wanted, config).sum() * (len(part) / len(images))
            loss.backward()  # not autograd.grad: the fused optimizer needs gradients in the layout of the weights


def task_losses(logits: Tensor, targets: Tensor, config: FinetuneConfig) -> Tensor:
    """The mean loss of each network, ``[T, B, 2]``, ``[T, B]`` → ``[T]``."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)
    if config.loss == "focal":
        losses = (1 - torch.exp(-losses)) ** 2 * losses  # γ = 2 (arXiv 1708.02002)
    return losses.mean(1)


def binary_start(base: Mapping[str, Tensor], network: nn.Module, bits: Tensor, fresh_head: bool = False) -> Stacked:
    """The base network for each task: its C-way classifier becomes the two mean rows of each side's classes.

    Args:
        base: state dict of the network with C outputs.
        network: the network with two outputs.
        bits: ``[T, C]``.
        fresh_head: take the classifier of ``network`` instead, the same for all tasks.
    """
    weights = repeat(base, len(bits))
    positive = bits.to(torch.float32)
    sides = torch.stack([1 - positive, positive], 1)  # [T, 2, C]
    sides = sides / sides.sum(-1, keepdim=True)
    for name, like in network.state_dict().items():
        if like.shape != base[name].shape:  # the classifier's weight [C, H] and bias [C]
            weights[name] = (
                repeat({name: like}, len(bits))[name]
                if fresh_head
                else torch.tensordot(sides, base[name].float(), dims=1).to(base[name].dtype)
            )
    return weights


def learning_rate_share(step: int, stage: Stage) -> float:
    """Share of the learning rate at ``step`` of a stage: all of it, or a linear warm-up and a cosine to 0."""
    return 1.0 if stage.schedule == "constant" else warm_cosine(step, stage.steps)


def checkpoint_stretches(steps: int, tail: float, checkpoints: int) -> list[tuple[int, int]]:
    """The steps (first excluded, last included) that each checkpoint is the mean of: the tail, cut evenly."""
    edges = [round(steps * (1 - tail * (1 - i / checkpoints))) for i in range(checkpoints + 1)]
    return [(min(first, last - 1), last) for first, last in itertools.pairwise(edges)]


@torch.no_grad()
def average_into(
    kept: list[Stacked], stretches: list[tuple[int, int]], step: int, weights: Mapping[str, Tensor]
) -> None:
    """Take the weights after ``step`` into the running mean of its stretch."""
    for number, (first, last) in enumerate(stretches):
        if first < step <= last:
            if number == len(kept):
                kept.append({name: value.detach().clone() for name, value in weights.items()})
                return
            for name, mean in kept[number].items():
                mean += (weights[name].detach() - mean) / (step - first)
            return

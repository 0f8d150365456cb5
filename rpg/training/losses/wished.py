"""The loss of wishes: predicted networks are run on training images, and shall have the loss that was asked for.

As in the behaviour loss, a part of every batch is put at the last time, so that what is scored is what one sampling
step generates. E examples, L tokens, D token width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rpg.models.conditioning import ConditionConfig
from rpg.tasks.base import LossTask
from rpg.training.config import BehaviourConfig
from tokenization.errors import InputError
from tokenization.layouts import Layout
from tokenization.zoo.metric import MetricScale

NEAR = 0.2
"""Errors on the scale from -1 to 1 up to which they count by their square; beyond, by their size."""


class WishedLoss:
    """Scores predicted tokens by how far the decoded networks' loss is from the one asked for.

    Args:
        task: runs the networks.
        layout: decodes tokens.
        config: weight and images.
        condition: the metric, which must be a loss on training images.
        scale: its scale.

    Raises:
        InputError: the task cannot run many networks at once, or the metric is no such loss.
    """

    def __init__(
        self, task: object, layout: Layout, config: BehaviourConfig, condition: ConditionConfig, scale: MetricScale
    ) -> None:
        if not isinstance(task, LossTask):
            raise InputError(
                f"train.behaviour with a metric needs a task that knows the loss of networks, "
                f"not {type(task).__name__}; choose one, e.g. trajectories"
            )
        if condition.name != "loss":
            raise InputError(
                f"train.behaviour asks for a loss on training images, which the metric {condition.name!r} is not; "
                "leave train.behaviour out, or set model.condition.name to loss"
            )
        self.task, self.layout, self.config, self.scale = task, layout, config, scale

    def __call__(self, tokens: Tensor, conditions: Tensor, dropped: Tensor | None, rng: torch.Generator) -> Tensor:
        """The weighted mean loss.

        Args:
            tokens: predicted x₀, ``[E, L, D]``.
            conditions: what is asked for, on the scale, ``[E, 1]``.
            dropped: ``[E]`` bool, whose condition was withheld: they are not scored.
            rng: draws the images, on the CPU.
        """
        weights = self.layout.decode_batch(tokens, constants=True)
        found = self.scale.scaled(self.task.losses(weights, "train", self.config.images, rng))  # [E]
        errors = F.smooth_l1_loss(found, conditions[:, 0], reduction="none", beta=NEAR)
        kept = torch.ones_like(errors) if dropped is None else (~dropped).to(errors.dtype)
        return self.config.weight * (errors * kept).sum() / kept.sum().clamp(min=1)

"""Behaviour loss: the predicted weights are run on training images of seen tasks, and their outputs scored.

A part of every batch is put at the last time, where its tokens are noise alone, so that the predicted x₀ is what one
sampling step generates. Decoded, those weights classify images as a function, and the cross-entropy of their answers
reaches the generator through them. The right answers are the images' labels, or those of a network: the zoo's shared
base, or the original itself (distillation, arXiv 1503.02531).

E examples, L tokens, D token width, C condition values, B images, K classes.
"""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch
from torch import Tensor

from rpg.models.centre import TaskTable
from rpg.models.recurrent_diffusion import RecurrentDiffusion
from rpg.tasks.base import BehaviourTask, ImageTaskFamily, TaskSimulator
from rpg.training.config import BehaviourConfig
from rpg.training.examples import Descriptions, ExampleConditions
from tokenization.errors import InputError
from tokenization.layouts import Layout
from tokenization.zoo.zoo import Zoo

OF_ORIGINALS = ("original", "both")
"""Targets that ask the checkpoints themselves."""


class BehaviourLoss:
    """Scores predicted tokens by the outputs of the decoded networks.

    Args:
        zoo: holds the base network, where that gives the right answers.

    Raises:
        InputError: the task cannot score many networks at once, the zoo has no base network, or originals of the task
            cannot give the right answers.
    """

    def __init__(self, task: object, layout: Layout, config: BehaviourConfig, zoo: Zoo) -> None:
        if not isinstance(task, BehaviourTask):
            raise InputError(
                f"train.behaviour needs a task of conditions, not {type(task).__name__}; choose one, e.g. "
                "digits_subsets"
            )
        if config.target in OF_ORIGINALS and not isinstance(task, ImageTaskFamily):
            raise InputError(f"train.behaviour.target: {config.target} needs a family of image tasks; set it to labels")
        if config.noise and "noise" not in inspect.signature(task.behaviour_losses).parameters:
            raise InputError(f"{type(task).__name__} has no noise on images; set train.behaviour.noise to 0")
        self.task, self.layout, self.config = task, layout, config
        self.teacher = task.teacher(zoo) if config.target in ("base", "both") else None
        self.seconds = 0.0
        self._backward_started = 0.0

    def __call__(
        self,
        tokens: Tensor,
        conditions: Tensor,
        dropped: Tensor | None,
        rng: torch.Generator,
        originals: Tensor | None = None,
    ) -> Tensor:
        """The weighted mean loss.

        Args:
            tokens: predicted x₀, ``[E, L, D]``.
            conditions: ``[E, C]``.
            dropped: ``[E]`` bool, whose condition was withheld: they are not scored.
            rng: draws the images, on the CPU.
            originals: the tokens that were to be predicted, ``[E, L, D]``; where they give the right answers.
        """
        started = time.perf_counter()
        if tokens.requires_grad:
            tokens.register_hook(self._end_backward)
        weights = self.layout.decode_batch(tokens, constants=True)
        more: dict[str, Any] = {"teacher": self.teacher} | ({"noise": self.config.noise} if self.config.noise else {})
        if self.config.target in OF_ORIGINALS:
            assert originals is not None
            more = {"teacher": self.teacher, "originals": self.layout.decode_batch(originals, constants=True)}
        losses = self.task.behaviour_losses(weights, conditions, self.config.images, rng, **more)  # [E]
        kept = torch.ones_like(losses) if dropped is None else (~dropped).to(losses.dtype)
        loss = self.config.weight * (losses * kept).sum() / kept.sum().clamp(min=1)
        self.seconds += time.perf_counter() - started
        if loss.requires_grad:
            loss.register_hook(self._start_backward)
        return loss

    def _start_backward(self, gradient: Tensor) -> None:
        self._backward_started = time.perf_counter()

    def _end_backward(self, gradient: Tensor) -> None:
        self.seconds += time.perf_counter() - self._backward_started

    def fraction_of(self, seconds: float) -> str:
        """The time it took, forward and backward, as a fraction of a run's seconds."""
        return f"{self.seconds / seconds:.0%}" if seconds > 0 else "0%"


class DrawnTasksLoss(BehaviourLoss):
    """The same of tasks that are drawn in every step, in place of the batch's: from the family that the zoo's come
    from, or from the zoo's own.

    Args:
        examples: shows examples of tasks, where they are the condition.
        known: the zoo's tasks ``[K, C]`` to draw from; None: fresh ones.
        reads_only: the networks learn nothing; the loss is the error of what is read of examples alone.

    Raises:
        InputError: as `BehaviourLoss`, or the task cannot draw others.
    """

    def __init__(
        self, network: RecurrentDiffusion, task: object, layout: Layout, config: BehaviourConfig, zoo: Zoo,
        examples: ExampleConditions | None = None, known: Tensor | None = None, reads_only: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(task, layout, config, zoo)
        has_codes = network.state is None or isinstance(network.state, TaskTable)
        if (known is None and not isinstance(task, TaskSimulator)) or zoo.condition is None or not has_codes:
            raise InputError(
                "train.behaviour.tasks: fresh needs a family that draws tasks, as sensors, and, like imitation: 0, "
                "model.state.of: none or task; set train.behaviour.tasks to zoo and train.imitation to 1"
            )
        told, wanted = network.config.condition.features, zoo.condition.num_inputs
        if told not in (0, wanted):
            raise InputError(f"model.condition.features is {told}, but tasks have {wanted} numbers; set it to that")
        self.network, self.simulator, self.spec, self.examples = network, task, zoo.condition, examples
        self.known, self.mask, self.reads_only = known, layout.mask.float(), reads_only

    def draw_tasks(self, num: int, rng: torch.Generator) -> Tensor:
        """Tasks ``[num, C]``."""
        if self.known is None:
            return self.simulator.draw_tasks(num, rng)  # type: ignore[attr-defined]
        return self.known[torch.randint(len(self.known), (num,), generator=rng)]

    def draw(self, rng: torch.Generator) -> Tensor:
        """The weighted mean loss of as many tasks as are configured; ``rng`` (on the CPU) draws everything.

        With it the error of what an encoder of examples tells of tasks, if it tells anything.
        """
        tasks = self.draw_tasks(self.config.networks, rng)
        noise = torch.randn(len(tasks), *self.mask.shape, generator=rng)
        tasks, noise, mask = (each.to(self.network.position_embedding.device) for each in (tasks, noise, self.mask))
        inputs, states = self.spec.inputs(tasks), None
        if self.reads_only and self.examples is not None:
            shown: Any = self.examples.draw(tasks, rng)  # of descriptions the settings, which their own loss reads
            told = shown if isinstance(self.examples, Descriptions) else self.network.condition.reader(shown)  # type: ignore[union-attr, misc]
            return self.config.weight * (told.float() - inputs).square().mean()
        if isinstance(self.network.state, TaskTable):
            codes = self.network.state.codes(inputs)
            states = codes + self.network.config.state.noise * torch.randn(codes.shape, generator=rng).to(codes)
        encoder, told = self.network.condition, None
        conditions: Tensor | None = inputs
        if self.examples is not None:  # where the prior alone sees them, none are drawn
            conditions = None if encoder is None else self.examples.draw(tasks, rng)
        if encoder is not None and self.network.config.condition.read and encoder.reader is not None:
            told, conditions = encoder.reader(conditions), inputs
        tokens = self.network.one_step(noise, mask, states, conditions)
        loss = self(tokens, tasks, None, rng)
        told = getattr(encoder, "told", None) if told is None else told
        return loss if told is None else loss + self.config.weight * (told.float() - inputs).square().mean()


def num_at_last_time(config: BehaviourConfig | None, num_examples: int) -> int:
    """How many of a batch's first examples are put at the last time."""
    return 0 if config is None or config.tasks == "fresh" else max(1, round(config.fraction * num_examples))

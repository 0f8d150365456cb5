"""Losses beside the denoiser's own: generated networks are run and their outputs scored.

A part of every batch is put at the last time, where its tokens are noise alone, so that what is scored is what one
sampling step generates. Decoded, those weights classify images, and the cross-entropy of their answers reaches the
generator. Right answers are the images' labels, or those of a network: the zoo's shared base, or the original itself
(distillation, arXiv 1503.02531).

E examples or networks, L tokens, D token width, K states or classes, S state width, C condition values, B images.
"""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rpg.config import BehaviourConfig, NewStatesConfig, TrainConfig
from rpg.models.conditioning import ConditionConfig
from rpg.models.recurrent_diffusion import Batch, Loss, RecurrentDiffusion
from rpg.models.states import TaskTable
from rpg.models.unet1d import UNet1d
from rpg.seeding import make_rng
from rpg.tasks import task_of
from rpg.tasks.base import BehaviourTask, ImageClassifier, ImageTaskFamily, LossTask, Task, TaskSimulator
from rpg.tasks.side_by_side import SideBySide
from rpg.training.data import Descriptions, ExampleConditions, TrainingSet
from rpg.training.distributed import DistributedContext
from tokenization.errors import InputError
from tokenization.layouts import Layout
from tokenization.zoo.condition import MetricScale
from tokenization.zoo.zoo import Zoo

OF_ORIGINALS = ("original", "both")
"""Targets that ask the checkpoints themselves."""


class BehaviourLoss:
    """Scores predicted tokens by the outputs of the decoded networks; a base network that answers lies with the zoo.

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
        self.options = config.model_dump(include={"noise", "temperature"}, exclude_defaults=True)
        for name in self.options.keys() - inspect.signature(task.behaviour_losses).parameters:
            raise InputError(f"{type(task).__name__} takes no train.behaviour.{name}; leave it out")
        self.task, self.layout, self.config = task, layout, config
        self.teacher = task.teacher(zoo) if config.target in ("base", "both") else None
        self.seconds = 0.0
        self._backward_started = 0.0

    def __call__(
        self, tokens: Tensor, conditions: Tensor, dropped: Tensor | None, rng: torch.Generator, originals: Any = None
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
        more: dict[str, Any] = {"teacher": self.teacher, **self.options}
        if self.config.target in OF_ORIGINALS:
            more["originals"] = self.layout.decode_batch(originals, constants=True)
        losses = self.task.behaviour_losses(weights, conditions, self.config.images, rng, **more)  # [E]
        loss = weighted_mean(self.config.weight, losses, dropped)
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


def weighted_mean(weight: float, losses: Tensor, dropped: Tensor | None) -> Tensor:
    """``weight`` times the mean of the losses ``[E]`` of examples that are not ``dropped`` ``[E]``."""
    kept = torch.ones_like(losses) if dropped is None else (~dropped).to(losses.dtype)
    return weight * (losses * kept).sum() / kept.sum().clamp(min=1)


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
        """The weighted mean loss of as many tasks as are configured, and the error of what is told of them, if any is.

        ``rng`` (on the CPU) draws everything.
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


def num_at_last_time(train: TrainConfig, num_examples: int) -> int:
    """How many of a batch's first examples are put at the last time."""
    behaviour = train.behaviour
    return 0 if behaviour is None or train.draws_tasks else max(1, round(behaviour.fraction * num_examples))


class NewStatesLoss:
    """Scores networks of new permutation states, which no checkpoint has: they must work, and differ from each other.

    A generator that only imitates its zoo is as good as a Gaussian with the zoo's variances: both know which weights
    vary, neither knows which changes hurt. Here states are drawn from a Gaussian around the learned ones, wider than
    they spread, and the cross-entropy of their networks reaches the generator. A second term keeps the networks of a
    step apart: without it, or if it only kept them away from the zoo, one new place would do for them all. Tokens have
    residual normalisation, so that 1 is the zoo's own root mean square deviation.

    Raises:
        InputError: there is no table of states to draw around, or the task has no images.
    """

    def __init__(self, network: RecurrentDiffusion, task: Task, layout: Layout, config: NewStatesConfig) -> None:
        if network.num_states < 2:
            raise InputError("train.new_states needs two or more permutation states; set model.state.of.")
        if network.condition is not None:
            raise InputError("train.new_states takes no condition; set model.condition.kind: none.")
        if isinstance(network.denoiser, UNet1d):
            raise InputError(
                "train.new_states does not go with model.denoiser unet1d, whose batch normalisation would count "
                "networks that are not in the zoo; use mlp."
            )
        if not isinstance(task, ImageClassifier):
            raise InputError(f"train.new_states needs a task with images; {type(task).__name__} has none.")
        if layout.options.normalization != "residual":
            raise InputError(
                f"train.new_states needs tokens.normalization: residual; it is {layout.options.normalization}."
            )
        self.network, self.layout, self.config = network, layout, config
        self.images, self.labels = task.images("train"), task.labels("train")
        self.networks = SideBySide(task.build())
        self.mask = layout.mask.float()

    def __call__(self, rng: torch.Generator) -> Tensor:
        """The weighted loss of one step; ``rng`` (on the CPU) draws states, noise and images."""
        count = self.config.networks
        temperature = 1 + (self.config.temperature - 1) * torch.rand(count, generator=rng)  # [E]
        noise = torch.randn(count, *self.mask.shape, generator=rng)  # [E, L, D]
        states = self.states(temperature, rng)
        tokens = self.network.one_step(noise.to(states.device), self.mask.to(states.device), states)  # [E, L, D]
        weights = self.layout.decode_batch(tokens, constants=True)
        rows = torch.randint(len(self.labels), (self.config.images,), generator=rng)
        logits = self.networks(weights, self.images[rows].to(tokens.device))  # [E, images, classes]
        labels = self.labels[rows].to(tokens.device).repeat(count)
        behaviour = F.cross_entropy(logits.flatten(0, 1).float(), labels)
        apart = (tokens - tokens.mean(0)).square().sum((1, 2)) * count / (count - 1)  # [E], unbiased
        size = (apart / self.mask.sum()).clamp(min=1e-12).sqrt()  # [E], root mean square, 1 in the zoo
        spread = F.relu(temperature.to(size.device) - size).square().mean()
        return self.config.weight * behaviour + self.config.spread * spread

    def states(self, temperature: Tensor, rng: torch.Generator) -> Tensor:
        """New states ``[E, S]``: the learned ones' Gaussian, each widened by its temperature ``[E]``."""
        assert self.network.state is not None
        table = self.network.state.weight.detach()  # [K, S]
        weights = torch.randn(len(temperature), len(table), generator=rng).to(table.device)
        deviation = weights @ (table - table.mean(0)) / len(table) ** 0.5
        return table.mean(0) + temperature.to(table.device)[:, None] * deviation


NEAR = 0.2
"""Errors on the scale from -1 to 1 up to which they count by their square; beyond, by their size."""


class TargetLoss:
    """Scores predicted tokens by how far the decoded networks' loss is from the one asked for, by how far their answers
    are from those of the checkpoints that are learned, or by the sum (``train.behaviour.target``).

    Raises:
        InputError: the task cannot run many networks at once, the metric is no such loss, or a base is to answer.
    """

    def __init__(
        self, task: object, layout: Layout, config: BehaviourConfig, condition: ConditionConfig, scale: MetricScale
    ) -> None:
        if not isinstance(task, LossTask):
            raise InputError(
                f"train.behaviour with a metric needs a task that knows the loss of networks, "
                f"not {type(task).__name__}; choose one, e.g. training_runs"
            )
        if condition.name != "loss":
            raise InputError(
                f"train.behaviour asks for a loss on training images, which the metric {condition.name!r} is not; "
                "leave train.behaviour out, or set model.condition.name to loss"
            )
        if config.target == "base":
            raise InputError("train.behaviour.target: base has no use with a metric; set it to labels or both")
        self.task, self.layout, self.config, self.scale = task, layout, config, scale

    def __call__(
        self, tokens: Tensor, conditions: Tensor, dropped: Tensor | None, rng: torch.Generator, originals: Tensor
    ) -> Tensor:
        """As of `BehaviourLoss`; ``conditions`` ``[E, 1]`` are what is asked for, on the scale."""
        weights, settings = self.layout.decode_batch(tokens, constants=True), self.config
        errors = tokens.new_zeros(len(tokens))
        if settings.target != "original":
            found = self.scale.scaled(self.task.losses(weights, "train", settings.images, rng))  # [E]
            errors = F.smooth_l1_loss(found, conditions[:, 0], reduction="none", beta=NEAR)
        if settings.target in OF_ORIGINALS:
            others = self.layout.decode_batch(originals, constants=True)
            errors = errors + self.task.divergences(weights, others, settings.images, rng, settings.noise)
        return weighted_mean(self.config.weight, errors, dropped)


class AuxiliaryLosses:
    """The sum of the losses that ``train.behaviour`` and ``train.new_states`` ask for; 0 without either.

    Raises:
        InputError: the task, the sampled tokens, the conditions or the processes do not allow it.
    """

    def __init__(
        self, data: TrainingSet, layout: Layout, network: RecurrentDiffusion, distributed: DistributedContext
    ) -> None:
        config, settings, condition = data.config, data.config.train, data.condition
        self.settings, self.seed, self.distributed = settings, config.seed, distributed
        self.behaviour: BehaviourLoss | TargetLoss | None = None
        self.new_states: NewStatesLoss | None = None
        if settings.behaviour is not None and settings.behaviour.weight:
            self.behaviour = self._behaviour(data, settings.behaviour, layout, network)
        if condition.kind == "examples" and condition.features and not isinstance(self.behaviour, DrawnTasksLoss):
            raise InputError("model.condition.features of examples needs train.behaviour and train.imitation: 0")
        if settings.new_states is not None:
            distributed.require_single("train.new_states")
            self.new_states = NewStatesLoss(network, task_of(data.zoo, config.task), layout, settings.new_states)

    def _behaviour(
        self, data: TrainingSet, behaviour: BehaviourConfig, layout: Layout, network: RecurrentDiffusion
    ) -> BehaviourLoss | TargetLoss:
        train, condition, zoo = data.config.train, data.condition, data.zoo
        if train.tokens is not None and train.tokens < layout.num_tokens:
            raise InputError(
                f"train.tokens is {train.tokens}, but train.behaviour needs a whole network; set it to null"
            )
        if condition.kind == "none":
            raise InputError("train.behaviour needs a condition that names the task; set model.condition.kind")
        task = task_of(zoo, data.config.task)
        if data.scale is not None:
            return TargetLoss(task, layout, behaviour, condition, data.scale)
        if train.imitation and not train.draws_tasks:
            return BehaviourLoss(task, layout, behaviour, zoo)
        self.distributed.require_single("train.behaviour.tasks: fresh" if train.imitation else "train.imitation: 0")
        known = None if train.draws_tasks else data.tasks
        return DrawnTasksLoss(network, task, layout, behaviour, zoo, data.examples, known, train.networks is not None)

    def __call__(self, step: int, batch: Batch, loss: Loss) -> torch.Tensor | float:
        """The losses of a step of this process, given its batch and what the denoiser made of it."""
        return self._behaviour_of(step, batch, loss) + self._new_states_of(step)

    def alone(self, step: int, part: int = 0) -> torch.Tensor:
        """The behaviour loss of tasks that part ``part`` of a step draws, which needs no batch."""
        assert isinstance(self.behaviour, DrawnTasksLoss)
        with self.distributed.accelerator.autocast():
            return self.behaviour.draw(make_rng(self.seed, "fresh tasks", step, *([part] if part else [])))

    def _behaviour_of(self, step: int, batch: Batch, loss: Loss) -> torch.Tensor | float:
        if self.behaviour is None:
            return 0.0
        if isinstance(self.behaviour, DrawnTasksLoss):
            return self.alone(step)
        assert loss.samples is not None and batch.conditions is not None
        rows = batch.group[: batch.num_last]
        dropped = None if batch.dropped is None else batch.dropped[rows]
        rng = make_rng(self.seed, "behaviour", step, 0)  # the same images on every process
        tasks = batch.conditions if batch.tasks is None else batch.tasks
        return self.behaviour(loss.samples, tasks[rows], dropped, rng, batch.samples[: batch.num_last])

    def _new_states_of(self, step: int) -> torch.Tensor | float:
        """The loss of new states, once it has set in."""
        settings = self.settings.new_states
        if self.new_states is None or settings is None or step < settings.start * self.settings.steps:
            return 0.0
        with self.distributed.accelerator.autocast():
            return self.new_states(make_rng(self.seed, "fresh", step))  # as earlier versions drew

    def facts(self, seconds: float) -> dict[str, str]:
        """What the model card says of the losses, after ``seconds`` of training."""
        if not isinstance(self.behaviour, BehaviourLoss):
            return {}
        return {"behaviour loss, share of training seconds": self.behaviour.fraction_of(seconds)}

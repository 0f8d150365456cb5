"""Losses beside the denoiser's own: generated networks are run, and what they answer is scored."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rpg.models.batch import Batch, Loss
from rpg.models.conditioning import ConditionConfig
from rpg.models.recurrent_diffusion import RecurrentDiffusion
from rpg.seeding import make_rng
from rpg.tasks import Task
from rpg.training.config import TrainConfig
from rpg.training.distributed import DistributedContext
from rpg.training.examples import example_conditions
from rpg.training.losses.behaviour import BehaviourLoss, FreshTasksLoss
from rpg.training.losses.new_states import NewStatesLoss
from rpg.training.losses.wished import WishedLoss
from tokenization.errors import InputError
from tokenization.layouts import Layout
from tokenization.zoo.metric import MetricScale
from tokenization.zoo.zoo import Zoo


class AuxiliaryLosses:
    """The sum of the losses that ``train.behaviour`` and ``train.new_states`` ask for; 0 without either.

    Args:
        settings: of training; which losses there are.
        seed: decides every draw.
        find_task: gives the task that scores networks; called only where a loss needs it.
        condition: what the generator is conditioned on.
        metric: the scale of its metric, if it is one.
        zoo: the checkpoints; beside them may lie the base network that is to be matched.
        layout: decodes tokens.
        network: the generator's networks; only the fresh-state loss runs them, which p-diff refuses to have.
        distributed: the processes of the run.

    Raises:
        InputError: the task, the sampled tokens, the conditions or the processes do not allow it.
    """

    def __init__(
        self,
        settings: TrainConfig,
        seed: int,
        find_task: Callable[[], Task],
        condition: ConditionConfig,
        zoo: Zoo,
        layout: Layout,
        network: RecurrentDiffusion,
        distributed: DistributedContext,
        metric: MetricScale | None = None,
    ) -> None:
        self.settings, self.seed, self.distributed = settings, seed, distributed
        self.behaviour: BehaviourLoss | WishedLoss | None = None
        self.new_states: NewStatesLoss | None = None
        if settings.behaviour is not None and settings.behaviour.weight:
            if settings.tokens is not None and settings.tokens < layout.num_tokens:
                raise InputError(
                    f"train.tokens is {settings.tokens}, but train.behaviour needs a whole network; set it to null"
                )
            if condition.kind == "none":
                raise InputError("train.behaviour needs a condition that names the task; set model.condition.kind")
            if metric is not None:
                self.behaviour = WishedLoss(find_task(), layout, settings.behaviour, condition, metric)
            elif settings.behaviour.tasks == "fresh":
                if distributed.world_size > 1 or distributed.spread != "none":
                    raise InputError(
                        "train.behaviour.tasks: fresh works in a single process without DeepSpeed or FSDP; start one."
                    )
                self.behaviour = FreshTasksLoss(
                    network, find_task(), layout, settings.behaviour, zoo, example_conditions(zoo, condition, seed)
                )
            else:
                self.behaviour = BehaviourLoss(find_task(), layout, settings.behaviour, zoo)
        if settings.new_states is not None:
            if distributed.world_size > 1 or distributed.spread != "none":
                raise InputError("train.new_states works in a single process without DeepSpeed or FSDP; start one.")
            self.new_states = NewStatesLoss(network, find_task(), layout, settings.new_states)

    def __call__(self, step: int, batch: Batch, loss: Loss) -> torch.Tensor | float:
        """The losses of a step of this process, given its batch and what the denoiser made of it."""
        return self._behaviour_of(step, batch, loss) + self._new_states_of(step)

    def _behaviour_of(self, step: int, batch: Batch, loss: Loss) -> torch.Tensor | float:
        if self.behaviour is None:
            return 0.0
        if isinstance(self.behaviour, FreshTasksLoss):
            with self.distributed.accelerator.autocast():
                return self.behaviour.draw(make_rng(self.seed, "fresh tasks", step))
        assert loss.samples is not None and batch.conditions is not None
        rows = batch.group[: batch.num_last]
        dropped = None if batch.dropped is None else batch.dropped[rows]
        rng = make_rng(self.seed, "behaviour", step, 0)  # the same images on every process
        tasks = batch.conditions if batch.tasks is None else batch.tasks
        given = (loss.samples, tasks[rows], dropped, rng)
        if isinstance(self.behaviour, BehaviourLoss):
            return self.behaviour(*given, batch.samples[: batch.num_last])
        return self.behaviour(*given)

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
